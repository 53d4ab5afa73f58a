"""How the tests compile a MODEL."""

from __future__ import annotations


def compiled(model, backend="eager"):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return TorchCompileModel.execute(model, backend)[0]


def with_traceable_attention(model):
    """The host's own choice on a CPU asks the operating system for free memory, which breaks every graph."""
    from comfy.ldm.modules.attention import attention_pytorch

    def attention(_chosen, *args, **kwargs):
        return attention_pytorch(*args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attention
    return clone
