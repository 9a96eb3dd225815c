"""The rules under their names of the version before; they are in `lightning_modules.em.rules` and `callbacks`."""

from lightning_modules._renamed import renamed

__getattr__ = renamed(
    __name__,
    {
        name: f"lightning_modules.em.rules.{name}"
        for name in ("BayesianRule", "GradientRule", "NewtonRule", "Rule", "RuleState", "SignRule")
    },
)
