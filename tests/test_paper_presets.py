"""The paper's presets by their names, on random models of their own 576 visual tokens.

The picture is a photograph. With 2,304 tokens of tiles to merge, two of them are as redundant to within
the rounding of the vision tower in every second picture or so (measured: the two backends' features
move redundancies by 5e-4, whose median distance is 3e-2), and then no two backends merge alike.
"""

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny import tiny_config, tiny_model, tiny_next_config, tiny_next_processor, tiny_processor

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.parity import Prompt, measure_gaps
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.torch_reference import TorchReference


def traced(folder, tiled):
    config = tiny_next_config(336, 14) if tiled else tiny_config()
    config.vision_config.image_size, config.vision_config.patch_size = 336, 14
    config.text_config.max_position_embeddings = 2048
    tiny_model(config).save_pretrained(folder)
    (tiny_next_processor if tiled else tiny_processor)(336, 14).save_pretrained(folder)
    return trace_model(resolve_model(folder))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("wide") / "model", tiled=False)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("tiled") / "model", tiled=True)


@pytest.mark.parametrize(
    "name",
    [
        "llava-100-156",
        "llava-256-320",  # nothing is merged, and the summaries make it longer than the picture
        "llava-64-156-pass-first-last",
        "llava-hd-576-576",
        "llava-hd-576-576-pass-last",
    ],
)
def test_rewritten_equals_patched(name, request, tmp_path):
    model = request.getfixturevalue("llava_next" if "hd" in name else "llava")
    config = SkipVisionConfig.preset(name)
    bundle = model.write(tmp_path / "bundle", config)
    reference = TorchReference(model.source, model.model)
    prompts = [Prompt(Image.fromarray(load_sample_image("china.jpg")), "What?")]
    gap = measure_gaps(bundle, reference, prompts, max_new_tokens=3, gaps=["rewrite"]).gaps["rewrite"]
    assert gap.passed
    layout = model.source.family.layout(model.source.config, config)
    inputs = bundle.prepare(prompts[0].image, prompts[0].question)
    done = bundle.run(inputs, 2)
    assert done.prompt_tokens - done.kv_tokens_after_prefill == layout.skipped
