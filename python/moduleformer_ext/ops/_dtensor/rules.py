"""All rules."""

from moduleformer_ext.ops._dtensor import attention, dispatch, experts, linear, loss, router

_REFUSED = (
    "blocks_decode",
    "quantised_gemm",
    *(f"{half}_layer_decode{overload}" for half in ("attention", "ffn") for overload in ("", ".with_route")),
)


def register() -> None:
    """Let the ops take DTensors, or refuse them by name."""
    for rule in (*attention.RULES, *experts.RULES, *linear.RULES, *loss.RULES, *router.RULES):
        dispatch.register(rule)
    for op in _REFUSED:
        dispatch.refuse(op)
