"""An engine in a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from .manifest import EngineManifest, PlanEntry


def engine_summary(name: str, manifest: EngineManifest) -> str:
    """Say what an engine is: target, size, and what the build log proved about its kernels."""
    plans = manifest.blocks
    profile = manifest.profile
    return "\n".join(
        (
            f"{name}: {len(plans)} plans, {_megabytes(manifest.plan_bytes)}, "
            f"{manifest.built_with}, for {', '.join(manifest.targets)}",
            _kernels(plans),
            f"up to {profile.max_img_tokens} image tokens, {profile.max_txt_tokens} text tokens, "
            f"batch {profile.max_batch}",
        )
    )


def _kernels(plans: Sequence[PlanEntry]) -> str:
    kinds = {"FP4 GEMMs": "fp4_gemms", "FP8 GEMMs": "fp8_gemms", "FP8 attention": "fp8_mha"}
    texts = []
    for label, kind in kinds.items():
        found = sum(getattr(plan, f"{kind}_found") for plan in plans)
        expected = sum(getattr(plan, f"{kind}_expected") for plan in plans)
        if expected:
            texts.append(f"{label} {found} of {expected}")
    return ", ".join(texts) or "everything in bf16"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
