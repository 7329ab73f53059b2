"""A cloud that is sold out, for Ray's autoscaler."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

_Provider: Any = FakeMultiNodeProvider


class NoMachines(_Provider):
    """Knows the head alone."""

    def create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        """Refuse, as AWS does."""
        raise RuntimeError("InsufficientInstanceCapacity")
