"""Pictures of any shape: what varies with them, positions of three axes, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from families import QWEN, write_qwen
from family_check import LIMIT, PARITY, Subject, picture
from full import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import write_questions
from transformers.vision_utils import get_vision_window_index

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.benchmark.floor import phase_work
from skipvision_export.benchmark.parity import Prompt, measure_gaps
from skipvision_export.benchmark.timing import BenchSettings, bench_inputs
from skipvision_export.cli import run
from skipvision_export.config import PRESETS
from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.names import GRID
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime.batch import PromptBatch
from skipvision_export.runtime.varying import LaidPictures, Patches, Placed, positions_of, windows_of
from skipvision_export.tensorrt.build import plan
from skipvision_export.tensorrt.recipe import Recipe

IMAGE = 3  # the random models' placeholder
# Of 4 to 100 visual tokens; the processor scales the last one down.
SIZES = ((32, 32), (96, 96), (200, 90), (48, 144), (400, 390))


@pytest.fixture(scope="module")
def subject(any_shape):
    return any_shape


@pytest.fixture(scope="module")
def dense(any_shape_dense):
    return any_shape_dense


# -- positions ---------------------------------------------------------------------------------------

ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), max_size=3),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, after=st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_dense_positions_are_the_model_s_own(subject, rows, after):
    """rows: of each prompt its pictures: text before, rows and columns of tokens."""
    prompts, placed, grids = [], [], []
    for row, text in zip(rows, after, strict=False):
        ids: list[int] = []
        own = []
        for before, height, width in row:
            ids += [9] * before + [IMAGE] * (height * width)
            layout = TokenLayout((("retained", height * width),))
            own.append(Placed(layout, height, width, np.arange(height * width)))
            grids.append([1, 2 * height, 2 * width])
        placed.append(own)
        prompts.append(np.array([ids + [9] * text]))
    batch = PromptBatch.join(prompts, IMAGE)
    found, following = positions_of(batch, IMAGE, placed)
    ids = torch.from_numpy(batch.input_ids)
    expected, deltas = subject.reference.model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=torch.tensor(grids).reshape(-1, 3),
        attention_mask=torch.from_numpy(batch.mask.astype(np.int64)),
    )
    assert (found == expected.numpy()).all()
    assert (following == batch.lengths + deltas[:, 0].numpy()).all()


def test_a_skipped_picture_takes_up_as_many_positions_as_a_dense_one():
    """A merged token stands where its destination is, a summary token in the middle."""
    layout = TokenLayout((("retained", 1), ("summary", 1), ("skipped", 1), ("summary", 1)))
    batch = PromptBatch.join([np.array([[9, 3, 3, 3, 3, 9]])], IMAGE)
    found, following = positions_of(batch, IMAGE, [[Placed(layout, 3, 5, np.array([14, -1, 6, -1]))]])
    assert found[:, 0].tolist() == [[0, 1, 1, 1, 1, 6], [0, 3, 2, 2, 2, 6], [0, 5, 3, 2, 3, 6]]
    assert following.tolist() == [7]


# -- what a bundle answers ---------------------------------------------------------------------------

CONFIGS = {
    "skip-90": SkipVisionConfig.preset("skip-90"),
    "uniform": SkipVisionConfig(skip_share=0.5, selector="uniform"),
    "raster": SkipVisionConfig(skip_share=0.5, selector="random", order="raster"),
    "strict": SkipVisionConfig(skip_share=0.5, summaries=True, strict=True),
    "capped": SkipVisionConfig(skip_share=0.25, most_retained=9),
    "capped and merged": SkipVisionConfig(
        skip_share=0.25, retained_share=0.5, summaries=True, most_retained=7, pass_through="last"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_and_caps(subject, name, tmp_path):
    bundle = subject.traced.write(tmp_path / "bundle", CONFIGS[name])
    prompts = len(SIZES) if FULL else 3
    given = [Prompt(picture(size), "What?") for size in SIZES[1 : 1 + prompts]]
    report = measure_gaps(bundle, subject.reference, given, max_new_tokens=4, gaps=PARITY)
    assert report.passed
    assert all(gap.overall.max_abs <= LIMIT for gap in report.gaps.values())
    most = bundle.config.most_retained
    if most is not None:
        assert max(done.retained_tokens for done in report.transcripts["ort"]) == most


def several(bundle_or_reference):
    """Prompts with two pictures, none, one and three."""
    counts = ((0, 3), (), (2,), (1, 4, 1))
    texts = ("Which?", "Is it red?", "What is in the picture?", "How many are there?")
    return [
        bundle_or_reference.prepare([picture(SIZES[i]) for i in pictures], text)
        for pictures, text in zip(counts, texts, strict=True)
    ]


def worst(expected, found):
    assert [one.token_ids for one in expected] == [one.token_ids for one in found]
    pairs = zip(expected, found, strict=True)
    return max(np.abs(a - b).max() for x, y in pairs for a, b in zip(x.logits, y.logits, strict=True))


def test_several_pictures_and_none(subject, dense):
    prompts = several(subject.reference)
    for bundle, config in ((dense, None), (subject.skip, subject.skip.config)):
        expected = [subject.reference.run(prompt, 5, config)[0] for prompt in prompts]
        found = [bundle.run(prompt, 5, keep_logits=True) for prompt in several(bundle)]
        assert worst(expected, found) <= LIMIT
        assert [one.pictures for one in found] == [2, 0, 1, 3]


def test_a_batch_gives_what_each_gives_alone(subject, dense):
    for bundle in (dense, subject.skip):
        prompts = several(bundle)
        alone = [bundle.run(prompt, 5, keep_logits=True) for prompt in prompts]
        assert worst(alone, bundle.run_batch(prompts, 5, keep_logits=True)) <= LIMIT


def test_the_patched_model_on_a_batch(subject):
    """Which takes batches padded on the left as any Hugging Face model does."""
    prompts = several(subject.skip)
    found = subject.skip.run_batch(prompts, 4, keep_logits=True)
    batch = PromptBatch.join([one.input_ids for one in several(subject.reference)], IMAGE)
    pictures = [one.pixel_values for one in prompts if len(one.pixel_values)]
    ids = torch.from_numpy(batch.input_ids)
    with torch.no_grad(), apply_skip_vision(subject.reference.model, subject.skip.config):
        out = subject.reference.model.generate(
            input_ids=ids,
            attention_mask=torch.from_numpy(batch.mask.astype(np.int64)),
            mm_token_type_ids=(ids == IMAGE).int(),
            pixel_values=torch.from_numpy(np.concatenate([one.pixel_values for one in pictures])),
            **{GRID: torch.from_numpy(np.concatenate([one.grids for one in pictures]))},
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for i, own in enumerate(found):
        for step, logits in enumerate(own.logits):
            assert np.abs(out.logits[step][i].numpy() - logits).max() <= LIMIT


def test_a_patched_forward_pass_finds_its_positions(subject):
    """Without generate(): the whole prompt at once, then one more token on the pruned cache."""
    model, config = subject.reference.model, subject.skip.config
    prompt = subject.reference.prepare(picture(SIZES[2]), "What?")
    ids = torch.from_numpy(prompt.input_ids)
    expected, _ = subject.reference.run(prompt, 2, config)
    given = {
        "pixel_values": torch.from_numpy(prompt.pixel_values.pixel_values),
        GRID: torch.from_numpy(prompt.pixel_values.grids),
    }
    with torch.no_grad(), apply_skip_vision(model, config):
        out = model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), **given, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        after = model(input_ids=token, past_key_values=out.past_key_values)
    for logits, own in zip((out.logits, after.logits), expected.logits, strict=True):
        assert np.abs(logits[0, -1].numpy() - own).max() <= LIMIT


DEEP = {
    "qwen2_vl": {"depth": 5},
    "qwen2_5_vl": {"depth": 5, "fullatt_block_indexes": [3]},
    "qwen3_vl": {"depth": 5, "deepstack_visual_indexes": [1, 3]},
}


@pytest.mark.parametrize("kind", QWEN if FULL else ["qwen2_5_vl"])
def test_layers_that_were_not_traced(kind, tmp_path):
    """Towers and decoders of more layers than a trace needs, where some do what the others do not."""
    write = partial(write_qwen, kind=kind, text={"num_hidden_layers": 4}, vision=DEEP[kind])
    subject = Subject.make(write, tmp_path)
    for bundle in (subject.dense(tmp_path / "dense"), subject.skip):
        report = subject.measure(bundle, ("export", "rewrite"), 3)
        assert report.passed


# -- parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "window"), [(2, 4), (2, 8), (1, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (10, 8), (2, 2), (18, 34)])
def test_windows_are_the_model_s_own(rows, columns, side, window):
    found = [set(row[row < rows * columns]) for row in windows_of(np.array([1, rows, columns]), side, window)]
    tokens, ends = get_vision_window_index(torch.tensor([[1, rows, columns]]), side, window, 1)
    patches = (tokens[:, None] * side**2 + torch.arange(side**2)).flatten().tolist()
    expected = [set(patches[a:b]) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    assert found == expected


def test_some_pictures_of_several():
    grids = np.array([[1, 2, 2], [1, 2, 4], [1, 4, 4]])
    whole = Patches(np.arange(28, dtype=np.float32)[:, None], grids)
    later = whole[1:]
    assert len(later) == 2
    assert later.pixel_values[:, 0].tolist() == list(range(4, 28))
    assert [len(pixels) for pixels, _ in whole.each()] == [4, 8, 16]


def test_joined_pictures_keep_their_order():
    parts = [LaidPictures(np.full((1, n, 2), n), np.array([[1, n, 1]]), (np.arange(n),)) for n in (2, 3)]
    joined = LaidPictures.join(parts)
    assert joined.features[0, :, 0].tolist() == [2, 2, 3, 3, 3]
    assert [len(places) for places in joined.places] == [2, 3]


def test_a_cap_bounds_what_is_retained():
    capped = SkipVisionConfig(skip_share=0.5, most_retained=100)
    for visual in (4, 100, 200, 201, 5000):
        layout = capped.layout(visual, varies=True)
        assert layout.retained == min(100, visual - round(visual / 2))
        assert layout.total == visual
    merged = SkipVisionConfig(skip_share=0.2, retained_share=0.3, most_retained=100)
    assert merged.layout(1000, varies=True).runs == (("retained", 100), ("skipped", 200))
    assert SkipVisionConfig(skip_share=0.0, most_retained=9).is_dense is False
    assert SkipVisionConfig.from_json(capped.to_json()) == capped
    for wrong in ({"most_retained": 0, "skip_share": 0.5}, {"most_retained": 5, "retained": 9, "skipped": 1}):
        with pytest.raises(ConfigError, match="most_retained"):
            SkipVisionConfig(**wrong)


def test_bench_takes_a_square_picture(subject):
    inputs = bench_inputs(subject.skip, BenchSettings.text_tokens)
    done = subject.skip.run(inputs, 2)
    assert done.prompt_tokens == inputs.input_ids.shape[1]
    assert done.kv_tokens_after_prefill == BenchSettings.text_tokens + subject.skip.manifest.layout.kept_kv
    assert phase_work(subject.skip, 64, 2)["prefill"].flops > 0


# -- the command line, and what is refused -----------------------------------------------------------


def refused(capsys, *args):
    assert run([str(arg) for arg in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    return lines[0]


def test_commands(subject, capsys, tmp_path):
    model, out = subject.traced.source.folder, subject.skip.folder
    data = write_questions(tmp_path)
    assert run(["inspect", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "256 visual tokens of a square picture (other pictures have others)" in shown
    assert "made for fixed numbers of visual tokens, this model has more or less of them" in shown
    options = ["--preset", "quarter", "--most-retained", "20", "--no-summaries"]
    assert run(["export", str(model), "-o", str(tmp_path / "out"), *options, "--dry-run"]) == 0
    assert (
        "quarter-no-summaries-most-20: 20 visual tokens retained, 41 skipped of a square picture's 256"
        in (capsys.readouterr().out)
    )
    assert run(["validate", str(out), "--model", str(model), "--samples", "2", "--max-new-tokens", "4"]) == 0
    assert "layers    ok" in capsys.readouterr().out
    for batch in ("1", "3"):
        assert run(["evaluate", str(out), "--data", str(data), "--batch", batch]) == 0
    assert run(["evaluate", str(model), "--data", str(data), "--preset", "skip-50", "--limit", "3"]) == 0


def test_what_does_not_fit_is_refused(subject, capsys, tmp_path):
    model, skip, data = subject.traced.source.folder, subject.skip.folder, write_questions(tmp_path)
    export = ("export", model, "-o", tmp_path / "out")
    fixed = "is for fixed numbers of visual tokens"
    assert fixed in refused(capsys, *export, "--retained", "10", "--skipped", "10")
    for name, preset in PRESETS.items():
        if preset.retained is not None:
            with pytest.raises(ConfigError, match="fixed numbers"):
                subject.traced.source.family.layout(
                    subject.traced.source.config, SkipVisionConfig.preset(name)
                )
    policy = tmp_path / "policy.json"
    policy.write_text('{"layer_shares": [0.0, 0.5, 0.9]}')
    assert "is for one number of visual tokens" in refused(capsys, *export, "--policy", policy)
    assert "positions on one axis" in refused(capsys, *export, "--dense", "--target", "genai")
    assert "leave out --selector" in refused(capsys, *export, "--dense", "--most-retained", "5")
    with pytest.raises(ConfigError, match="takes pictures of any shape"):
        plan(skip, Recipe(precision=("float32",)))
    calibrate = ("calibrate", model, "--data", data, "-o", tmp_path / "new.json", "--flops", "0.8")
    assert "calibration is for models with one crop" in refused(capsys, *calibrate)
    decoder = skip / "onnx" / "decoder_prefill.onnx"
    assert "have three axes" in refused(capsys, "validate", decoder, "--model", model)
    finetune = ("finetune", model, "--data", data, "-o", tmp_path / "tuned", "--preset", "quarter")
    assert "training of" in refused(capsys, *finetune)


def test_a_picture_that_is_too_small_or_too_long(subject, capsys, tmp_path):
    config = SkipVisionConfig(skip_share=0.9, summaries=True)
    bundle = subject.traced.write(tmp_path / "bundle", config)
    small, long = tmp_path / "small.png", tmp_path / "long.png"
    picture(SIZES[0]).save(small)
    picture((2010, 10)).save(long)
    ask = ("generate", bundle.folder, "--prompt", "What?", "--image")
    assert "leaves 0 retained and 4 skipped tokens of a picture with 4" in refused(capsys, *ask, small)
    assert "aspect ratio" in refused(capsys, *ask, long)
