"""How blocks are called does not depend on how the model's folder was named."""

from pathlib import Path

from diffusers import HunyuanVideoTransformer3DModel

from reelquant.calibration.input_groups import block_calls
from reelquant.families.family import family_of_architecture


def test_a_model_opened_by_a_path_is_called_like_any_other(digits_model: Path) -> None:
    """diffusers keeps the argument of `from_pretrained` in the configuration."""
    folder = digits_model / "transformer"
    family = family_of_architecture("HunyuanVideoTransformer3DModel")
    by_path, by_text = (HunyuanVideoTransformer3DModel.from_pretrained(given) for given in (folder, str(folder)))
    calls = block_calls(family, by_path.config)
    assert list(calls) == list(family.block_names(by_path.config))
    assert calls is block_calls(family, by_text.config), "found once"
