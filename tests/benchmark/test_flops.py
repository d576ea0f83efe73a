"""The share of visual FLOPs against the numbers of the paper."""

from dataclasses import replace

import pytest

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.flops import visual_flops_share
from skipvision_export.models import DecoderDims

LLAMA_3_8B = DecoderDims(32, 4096, 32, 8, 128, 14336, 128256)
VICUNA_7B = DecoderDims(32, 4096, 32, 32, 128, 11008, 32064)


@pytest.mark.parametrize(("preset", "share"), [("llava-100-156", 0.229), ("llava-256-320", 0.555)])
def test_the_paper_s_shares(preset, share):
    layout = SkipVisionConfig.preset(preset).layout(576)
    assert visual_flops_share(LLAMA_3_8B, layout, 576) == pytest.approx(share, abs=5e-4)


def test_a_skipped_token_costs_its_attention_projections():
    layout = SkipVisionConfig.counts(0, 576).layout(576)
    assert visual_flops_share(LLAMA_3_8B, layout, 576) == pytest.approx(0.192, abs=5e-4)
    assert visual_flops_share(VICUNA_7B, layout, 576) == pytest.approx(0.332, abs=5e-4)


def test_what_does_not_skip_is_whole():
    dense = SkipVisionConfig.dense().layout(576)
    kept = replace(SkipVisionConfig.counts(100, 476), skip_ffn=False).layout(576)
    assert visual_flops_share(VICUNA_7B, dense, 576) == 1
    assert visual_flops_share(VICUNA_7B, kept, 576) == 1
