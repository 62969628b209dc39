"""The converted weights are those that transformers reads from the same GGUF."""

import pytest
import torch


def test_smollm2_is_its_gguf(smollm2):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    converted = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert converted.config.rms_norm_eps == 1e-5
    assert converted.config.rope_parameters["rope_theta"] == 1e5
    with torch.device("meta"):
        names = transformers.AutoModelForCausalLM.from_config(converted.config)
    path = str(smollm2 / "model.gguf")
    gguf = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)
    weights = converted.state_dict()
    assert weights.keys() - gguf["tensors"].keys() == {"lm_head.weight"}  # tied
    for name, weight in gguf["tensors"].items():
        assert torch.equal(weights[name], torch.as_tensor(weight)), name

    prompt = torch.tensor([[504, 2904, 282, 4649, 314, 260]])
    with torch.no_grad():
        logits = converted(prompt).logits
        converted.load_state_dict(gguf["tensors"], strict=False)
        assert torch.equal(converted(prompt).logits, logits)
