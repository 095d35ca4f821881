"""What a checkpoint says about its network: arch, stem and traits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastuft.model.backbone import Stem, Traits
from fastuft.model.checkpoint.conversion import saved_traits, traits_from
from fastuft.model.checkpoint.reading import Content, shown
from fastuft.model.checkpoint.transformers_folder import network_of

METADATA_KEY = "fastuft"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about its network; None if it says nothing."""

    arch: str | None
    stem: Stem | None
    traits: Traits


def described(content: Content) -> Description:
    """What a checkpoint says about its network; raises ValueError if that is damaged."""
    file = str(content.path)
    said: Mapping[str, Any] = content.settings.get("model_config", {})
    try:
        traits = saved_traits(content)
        if METADATA_KEY in content.metadata:
            said = json.loads(content.metadata[METADATA_KEY])
            traits = traits_from(said.get("traits"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {file!r} has a damaged description of its network ({shown(str(error), 200)})"
        ) from error
    if "config" in content.settings:
        said = {"arch": network_of(content.settings["config"]), "stem": "imagenet"}
    arch, stem = said.get("arch"), said.get("stem")
    if not isinstance(arch, str | None) or stem not in (None, "imagenet", "small"):
        raise ValueError(f"checkpoint {file!r} has a damaged description of its network (arch={arch!r}, stem={stem!r})")
    return Description(arch, stem, traits)
