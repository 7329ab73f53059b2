"""For processes of their own, which need not import what their test imports."""

from storage.open_store import open_store


def put_once(place: str, content: str) -> bool:
    """Whether this process was the one that wrote the file."""
    try:
        open_store(place).put("config.json", content.encode(), exclusive=True)
    except FileExistsError:
        return False
    return True
