"""Calibration of the tiny random model, and of one with a layer that does nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.benchmark.flops import prefill_cost
from skipvision_export.calibration import Budget, Settings, calibrate, lazy_greedy, plan
from skipvision_export.calibration.ffn_update import ffn_update
from skipvision_export.calibration.probe import Probe
from skipvision_export.calibration.samples import draw, encode
from skipvision_export.cli import run
from skipvision_export.errors import ConfigError, InputError
from skipvision_export.models.loading import load_model, load_processor, resolve_model

SETTINGS = Settings(samples=4, shares=(0.5, 1.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{i}.png")
        rows += [
            {"file_name": f"{i}.png", "question": q, "answer": a}
            for q, a in (("What?", "a cat"), ("How many are there?", "3"))
        ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def source(tiny_folder):
    return resolve_model(tiny_folder)


@pytest.fixture
def model(source):
    return load_model(source)


@pytest.fixture
def probe(source, model, data):
    samples = encode(source, load_processor(source.folder), draw(data, 4, 0), 2)
    return Probe(source, model, samples)


def zero(model, layer):
    with torch.no_grad():
        model.model.language_model.layers[layer].mlp.down_proj.weight.zero_()


# -- measuring ---------------------------------------------------------------------------------------


def config(*shares, **options):
    return Settings(**options).config(shares, 64)


def plain_divergence(probe, policy):
    """The same by whole sequences and without any cache; for policies that keep K/V."""
    values = []
    for sample in probe.samples:
        prompt = torch.from_numpy(sample.prompt.input_ids)
        answer = torch.from_numpy(sample.answer)
        ids = torch.cat([prompt, answer[:, :-1]], 1)
        pixels = torch.from_numpy(sample.prompt.pixel_values)
        with torch.no_grad():
            dense = probe.model(input_ids=ids, pixel_values=pixels).logits
            with apply_skip_vision(probe.model, policy):
                skipped = probe.model(input_ids=ids, pixel_values=pixels).logits
        p, q = (x[0, prompt.shape[1] - 1 :].double().log_softmax(-1) for x in (dense, skipped))
        assert p.shape[0] == answer.shape[1]
        values += torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).tolist()
    return np.mean(values)


@pytest.mark.parametrize("selector", ["uniform", "cls_attention"])
def test_divergence_equals_the_plain_way(probe, selector):
    policy = config(0.5, 1.0, 0.0, selector=selector)
    expected = plain_divergence(probe, policy)
    with probe.cached_vision():
        first, second = probe.divergence(policy), probe.divergence(policy)
        assert first == second == pytest.approx(expected, rel=1e-4)
        # the broken twin: every sample gets the cached picture of the first
        probe.samples = [replace(sample, image=probe.samples[0].image) for sample in probe.samples]
        assert abs(probe.divergence(policy) / expected - 1) > 0.01
    assert "forward" not in vars(probe.source.family.vision_tower(probe.model))


def test_dense_diverges_nowhere_and_dropped_kv_counts(probe):
    assert probe.divergence(config(0.0, 0.0, 0.0)) == 0
    kept, dropped = (probe.divergence(config(0.0, 1.0, 0.0, kv_share=kv)) for kv in (0.0, 1.0))
    assert kept > 1e-6
    assert dropped != pytest.approx(kept, rel=1e-3)


def test_the_last_layer_is_free_where_kv_stays(probe):
    # Nothing reads a visual token's state after the last layer's attention.
    assert probe.divergence(config(0.0, 0.0, 1.0)) < 1e-9
    assert probe.divergence(config(1.0, 0.0, 0.0)) > 1e-6


def test_ffn_update_equals_a_plain_computation(probe):
    rows = ffn_update(probe)
    ratios = {"visual": [], "text": []}
    layer = probe.model.model.language_model.layers[1]
    for sample in probe.samples:
        ids = torch.from_numpy(sample.prompt.input_ids)
        pixels = torch.from_numpy(sample.prompt.pixel_values)
        with torch.no_grad():
            states = probe.model(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states
            out = states[2][0]
            # what comes out of the layer minus its FFN's update is what went into the FFN
            seen = []
            hook = layer.mlp.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o[0]))
            probe.model(input_ids=ids, pixel_values=pixels)
            hook.remove()
        ratio = seen[0].norm(dim=-1) / (out - seen[0]).norm(dim=-1)
        ratios["visual"] += ratio[ids[0] == 3].tolist()
        ratios["text"] += ratio[ids[0] != 3].tolist()
    assert rows[1]["summary"] is None
    for kind, values in ratios.items():
        assert rows[1][kind] == pytest.approx(np.mean(values), rel=1e-4)
    assert np.mean(ratios["visual"]) != pytest.approx(np.mean(ratios["text"]), rel=1e-2)


def test_ffn_update_of_a_trained_configuration(probe):
    saved = SkipVisionConfig(skip_share=0.25, retained_share=0.25, summaries=True)
    rows = ffn_update(probe, saved)
    assert all(row["summary"] > 0 and row["visual"] > 0 for row in rows)
    zero(probe.model, 1)
    assert ffn_update(probe, saved)[1] == {"visual": 0, "summary": 0, "text": 0}
    nothing_retained = SkipVisionConfig.counts(0, 64)
    assert ffn_update(probe, nothing_retained)[0]["visual"] is None


# -- the whole ---------------------------------------------------------------------------------------


def test_flops_budget(source, model, data):
    found = calibrate(plan(source, data, Budget(flops=0.75), SETTINGS), model)
    dims = source.family.decoder_dims(source.config)
    dense, best = (
        prefill_cost(dims, source.family.layout(source.config, c), found.plan.text_tokens).prefill_flops
        for c in (SkipVisionConfig.dense(), found.config)
    )
    assert (found.search.path[0].flops, found.best.flops) == (dense, best)
    assert best <= 0.75 * dense
    assert found.best.divergence == Probe(source, model, found.plan.samples).divergence(found.config)


def test_divergence_budget(source, model, data):
    found = calibrate(plan(source, data, Budget(divergence=1e-3), SETTINGS), model)
    assert 0 < found.best.divergence <= 1e-3
    with pytest.raises(ConfigError, match="the least that any move costs"):
        calibrate(
            plan(source, data, Budget(divergence=1e-30), Settings(4, (1.0,), kv_share=1.0)),
            model,
        )


def test_the_harmless_layer_comes_first_and_the_last_one_never(source, model, data):
    # The first layer does nothing, the middle one is loud; skipping in the last one saves nothing.
    zero(model, 0)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight.mul_(4)
    made = plan(source, data, Budget(flops=0.67), Settings(4, (1.0,)))

    def order(search):
        assert not any(point.shares[2] for point in search.tried)
        return [next(n for n, point in enumerate(search.path) if point.shares[i]) for i in range(2)]

    assert order(calibrate(made, model).search) == [1, 2]
    # the broken twin: each layer gets the score of the other
    probe = Probe(source, model, made.samples)
    twin = lazy_greedy(
        3,
        (1.0,),
        lambda shares: probe.divergence(made.config((shares[1], shares[0], shares[2]))),
        made.flops,
        made.budget,
    )
    assert order(twin) == [2, 1]


def test_policy_file(source, model, data, tmp_path):
    found = calibrate(plan(source, data, Budget(flops=0.8), SETTINGS), model)
    file = tmp_path / "policy.json"
    policy = found.to_json()
    file.write_text(json.dumps(policy))
    assert SkipVisionConfig.load(file) == found.config
    assert [row["share"] for row in policy["layers"]] == list(found.best.shares)
    assert [row["skipped_tokens"] for row in policy["layers"]] == [64 * s for s in found.best.shares]
    with apply_skip_vision(model, file) as state:
        assert state.layout.layer_tiers == found.config.layout(64).layer_tiers
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"kind": "recipe"}, "kind is 'recipe'"),
        ({"config": {"skip_share": 0.5}}, "layer_shares"),
        ({"config": policy["config"] | {"visual_tokens": 576}}, "576 visual tokens"),
        ({"config": policy["config"] | {"layer_shares": [0.5] * 4}}, "4 layers"),
    ):
        file.write_text(json.dumps(policy | change))
        with pytest.raises(ConfigError, match=message), apply_skip_vision(model, file):
            pass


def test_answers_are_tokenized_behind_their_prompt(source, data):
    processor = load_processor(source.folder)
    samples = draw(data, 6, 0)
    for sample, forced in zip(samples, encode(source, processor, samples, 2), strict=True):
        assert processor.tokenizer.decode(forced.answer[0][:-1].tolist()) == f" {sample.answer}"
        assert forced.answer[0, -1] == 2
    assert draw(data, 3, 1) != draw(data, 3, 2)


# -- the command -------------------------------------------------------------------------------------


def test_command(tiny_folder, data, tmp_path):
    out, result = tmp_path / "policy.json", tmp_path / "result.json"
    args = ["calibrate", str(tiny_folder), "--data", str(data), "-o", str(out), "--flops", "0.8"]
    args += ["--json", str(result), "--samples", "4", "--shares", "1.0"]
    assert run([*args, "--dry-run"]) == 0
    assert not out.exists()
    assert run(args) == 0
    told = json.loads(result.read_text())
    assert told["policy"] == str(out)
    assert {"flops", "divergence"} <= set(told["curve"][0])
    assert out.with_suffix(".svg").read_text().startswith("<svg")
    assert json.loads(out.read_text())["budget"] == {"flops": 0.8, "max_divergence": None}
    assert run(args) == 2
    assert run([*args, "--force"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "exactly one budget"),
        (("--flops", "0.5", "--max-divergence", "1"), "exactly one budget"),
        (("--flops", "1.5"), "outside (0, 1)"),
        (("--flops", "0.1"), "cannot be met"),
        (("--flops", "0.8", "--shares", "half"), "no list of numbers"),
        (("--flops", "0.8", "--shares", "0.5,2"), "--shares"),
        (("--flops", "0.8", "--selector", "nope"), "'nope' is not one of"),
        (("--flops", "0.8", "--device", "toaster"), "device 'toaster'"),
        (("--flops", "0.8", "--dtype", "int3"), "dtype 'int3'"),
    ],
)
def test_mistakes_get_one_line(capsys, tiny_folder, data, tmp_path, options, message):
    out = tmp_path / "policy.json"
    assert run(["calibrate", str(tiny_folder), "--data", str(data), "-o", str(out), *options]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    # on a slow machine lines of progress stand before it
    assert sum(line.startswith("skipvision: ") for line in err) == 1
    assert not list(tmp_path.iterdir())


def test_bad_data(capsys, source, tiny_folder, tmp_path):
    args = ["calibrate", str(tiny_folder), "-o", str(tmp_path / "p.json"), "--flops", "0.8", "--data"]
    assert run([*args, str(tmp_path)]) == 2
    assert "no metadata.jsonl" in capsys.readouterr().err
    row = {"file_name": "none.png", "question": "What?", "answer": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert run([*args, str(tmp_path)]) == 2
    assert "none.png does not exist" in capsys.readouterr().err
    Image.new("RGB", (96, 96)).save(tmp_path / "none.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | {"question": "word " * 200}))
    with pytest.raises(InputError, match="context has 512"):
        plan(source, tmp_path, Budget(flops=0.8))
