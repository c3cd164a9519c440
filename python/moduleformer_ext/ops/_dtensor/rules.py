"""All rules."""

from moduleformer_ext.ops._dtensor import attention, dispatch, experts, linear, loss, router


def register() -> None:
    """Let the ops take DTensors."""
    for rule in (*attention.RULES, *experts.RULES, *linear.RULES, *loss.RULES, *router.RULES):
        dispatch.register(rule)
