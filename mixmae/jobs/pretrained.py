"""The weights that a run starts from: read once by the driver, and kept in the run's folder for its workers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mixmae.convert import (
    Preprocessing,
    Weights,
    channels_of,
    describe,
    digest_of,
    load_checked,
    read_weights,
    save_encoder,
    with_channels,
)
from mixmae.data.images.decode import MODES
from mixmae.encoders.build import build_encoder, config_from_json, size_name
from mixmae.jobs.config import SupervisedConfig
from mixmae.jobs.record import Pretrained, RunRecord
from mixmae.jobs.supervised import INITIAL_FILE
from mixmae.stores import store_uri, without_secrets
from mixmae.training.run_folder import weights_of

ConfigT = TypeVar("ConfigT", bound=SupervisedConfig)


def read_pretrained(
    path: Path, config: ConfigT, usual: ConfigT, before: RunRecord | None, key: str | None = None
) -> tuple[Pretrained, Weights | None, ConfigT]:
    """Read pretrained weights, and let their architecture take the place of the recipe's.

    The architecture, and the pixel normalisation, are those of the file where it has them and the command line does
    not; drop path and image size stay the recipe's. The channels are the file's, unless the command line asks for
    others or images cannot be read in so many: then the first layer is adapted.

    Args:
        path: a run's folder or checkpoint, or a file or folder of any format of docs/weights.md; local, or in a store.
        config: what the command line asks for.  usual: the recipe's own.
        before: the interrupted run that is continued, if there is one.
        key: of one of several sets of weights in the file, as in convert.read_weights.
    Returns: the record of the weights; the weights, or None for a run that was begun with them and has them in its own
        folder; and the config with the encoder that they are for.
    Raises: ValueError if weights and encoder do not fit; FileNotFoundError.
    """
    # The recipe's own values, for the channels that the command line asks for.
    pixels = replace(usual, encoder=replace(usual.encoder, in_channels=config.encoder.in_channels))
    free = [name for name in ("pixel_mean", "pixel_std") if getattr(config, name) == getattr(pixels, name)]
    # Flags of drop path, size and channels do not name an architecture.
    unnamed = {name: getattr(config.encoder, name) for name in ("drop_path", "image_size", "in_channels")}
    keeps_encoder = config.encoder != replace(usual.encoder, **unnamed)
    channels = config.encoder.in_channels
    other_channels = channels != usual.encoder.in_channels

    uri = store_uri(path)
    place = path if uri else path.expanduser().resolve()
    shown = without_secrets(uri) if uri else str(place)
    begun_with = None if before is None else before.pretrained
    if before is not None and begun_with is not None and (begun_with.path, begun_with.key) == (shown, key):
        # As it was begun, whatever has become of the file since.
        changes: dict[str, Any] = {name: tuple(before.config[name]) for name in free}
        if not keeps_encoder:
            own = config_from_json(before.config["encoder"])
            kept = channels if other_channels else own.in_channels
            changes["encoder"] = replace(own, drop_path=config.encoder.drop_path, in_channels=kept)
        return begun_with, None, replace(config, **changes)

    weights = read_weights(weights_of(place), key=key)
    metadata = weights.metadata
    run_id = metadata.source.get("run_id") if metadata else None
    pretrained = Pretrained(
        path=shown, digest=digest_of(weights.state), run_id=str(run_id) if run_id else None, key=key
    )
    theirs = channels_of(weights)
    adapts = keeps_encoder or other_channels or metadata is None or theirs not in MODES
    if adapts and theirs not in (None, channels):
        weights = with_channels(weights, channels)
        metadata = weights.metadata
        print(
            f"note: the weights of {shown} are for images of {theirs} channels, and the encoder is for {channels}: "
            f"their first layer is {'summed up' if channels == 1 else 'repeated and rescaled'}"
        )
    if metadata is None:
        print(f"note: {shown} does not say its architecture ({weights.unknown}): taking the recipe's encoder")
        return pretrained, weights, config
    changes = {name: getattr(metadata.preprocessing, name.removeprefix("pixel_")) for name in free}
    if not keeps_encoder:
        changes["encoder"] = config.adapted(replace(metadata.encoder, drop_path=config.encoder.drop_path))
        if changes["encoder"] != config.sized_encoder():
            print(
                f"note: the encoder is the one of {shown}, {describe(weights.state)}; the recipe's is "
                f"{size_name(config.encoder) or 'another one'}. Rates, drop path and length stay the recipe's."
            )
    return pretrained, weights, replace(config, **changes)


def keep_initial(pretrained: Pretrained, weights: Weights, config: SupervisedConfig, folder: Path) -> None:
    """Fit the weights to the encoder and keep it in the run's folder, where every worker and every restart finds it.

    Raises: ValueError if they do not fit.
    """
    encoder = build_encoder(config.sized_encoder())
    assert isinstance(encoder, nn.Module)
    own = {name: value for name, value in weights.state.items() if name.startswith("encoder.")}
    place = Path(pretrained.path)
    load_checked(encoder, replace(weights, state=own), place if store_uri(place) else weights_of(place))
    preprocessing = Preprocessing(image_size=config.augment.size, mean=config.pixel_mean, std=config.pixel_std)
    save_encoder(folder / INITIAL_FILE, encoder, preprocessing, source=asdict(pretrained), overwrite=True)
