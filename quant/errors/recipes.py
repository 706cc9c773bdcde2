"""Errors about recipes and their budgets."""

from __future__ import annotations

from . import QuantError, shortened


class RecipeError(QuantError):
    """A recipe cannot be used.

    Attributes:
        name: Of the recipe or its file.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, shortened(reason)
        super().__init__(
            f"Recipe {name!r} cannot be used: {self.reason}. "
            "Correct the file or choose another recipe in 'Quantize FLUX to FP4'."
        )


class FormatBudgetError(QuantError):
    """The budget of recipe ``auto`` cannot be kept.

    Attributes:
        found: What would be needed.
        limit: The budget.
    """

    def __init__(self, found: str, limit: str) -> None:
        self.found, self.limit = found, limit
        super().__init__(
            f"Recipe 'auto' cannot keep its budget: {found}; {limit}. "
            "Raise 'auto: size limit (GiB)' or lower 'auto: quality floor (dB)' in 'Quantize "
            "FLUX to FP4'."
        )
