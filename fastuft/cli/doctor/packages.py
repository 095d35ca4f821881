"""The checks of packages: DALI, apex, those that the command line needs, and optional ones."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from fastuft.cli.doctor import environment
from fastuft.cli.doctor.finding import Finding

OPTIONAL = {
    "timm": "for model.arch=timm:NAME: pip install timm",
    "torchvision": "for checking exports; the program itself does not need it",
    "openTSNE": "for faster t-SNE maps: pip install openTSNE",
    "wandb": "for runtime.wandb=true: pip install wandb",
    "pyarrow": "for fastuft embed --out FILE.parquet: pip install pyarrow",
}
# The lowest versions in pyproject.toml.
NEEDED = {
    "numpy": "1.26",
    "filelock": "3.13",
    "jsonargparse": "4.49",
    "PyYAML": "6",
    "safetensors": "0.5",
    "tensorboard": "2.18",
    "tqdm": "4.66",
    "pillow": "11",
    "scikit-learn": "1.5",
    "matplotlib": "3.9",
    "jinja2": "3.1",
    "packaging": "23",
}
DALI = "2.0"
EXTRA = "pip install 'fastuft[train-cu13]' (or -cu12, -cpu)"


def check_dali(torch: ModuleType | None) -> Iterator[Finding]:
    """DALI, its CUDA version compared with torch's and the driver's, and the decoy package."""
    wheels = [wheel for wheel in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if environment.version(wheel)]
    decoy = environment.version("nvidia-dali")
    if decoy and not wheels:
        remedy = f"that package is a placeholder: pip uninstall nvidia-dali; {EXTRA}"
        yield Finding("DALI", "problem", decoy, remedy)
        return
    if not wheels:
        yield Finding("DALI", "missing", "not installed", f"{EXTRA}; without it the slower PyTorch loader runs")
        return
    if len(wheels) > 1:
        remedy = "they overwrite each other's files: uninstall both, then install the one for your CUDA"
        yield Finding("DALI", "problem", " and ".join(wheels), remedy)
        return
    found = environment.version(*wheels) or wheels[0]
    dali_cuda = 12 if wheels[0].endswith("cuda120") else 13
    torch_cuda = environment.major(torch.version.cuda) if torch is not None else None
    driver = environment.major(environment.driver_cuda())
    if environment.older(found, DALI):
        yield Finding("DALI", "problem", found, f"pip install --upgrade '{wheels[0]}>={DALI}'")
    elif torch_cuda and torch_cuda != dali_cuda:
        remedy = f"pip uninstall {wheels[0]}; pip install nvidia-dali-cuda{torch_cuda}0"
        yield Finding("DALI", "problem", f"{found} beside torch for CUDA {torch_cuda}", remedy)
    elif driver is not None and driver < dali_cuda:
        remedy = f"install a newer driver, or nvidia-dali-cuda{driver}0"
        yield Finding("DALI", "problem", f"{found}, but the driver supports CUDA {driver}", remedy)
    else:
        remedy = "" if decoy is None else "the placeholder nvidia-dali is installed too: pip uninstall nvidia-dali"
        yield Finding("DALI", "ok", found, remedy)


def check_apex() -> Iterator[Finding]:
    """NVIDIA's apex (opt-in), and the unrelated package with the same name."""
    found = environment.version("apex")
    if found is None:
        yield Finding("apex", "missing", "not installed", "only for optim.optimizer=apex_fused_sgd; sgd is fused too")
    elif environment.importable("apex") and environment.importable("apex.optimizers"):
        yield Finding("apex", "ok", found)
    else:
        remedy = "this is an unrelated web toolkit: pip uninstall apex; build NVIDIA's apex from its repository"
        yield Finding("apex", "problem", found, remedy)


def check_packages() -> Iterator[Finding]:
    """The packages that the command line needs, and optional ones."""
    installed = {name: environment.version(name) for name in NEEDED}
    lacking = [name for name, found in installed.items() if found is None]
    stale = [
        f"{found} < {NEEDED[name]}"
        for name, found in installed.items()
        if found and environment.older(found, NEEDED[name])
    ]
    if lacking or stale:
        parts = [f"missing: {', '.join(lacking)}"] if lacking else []
        parts += [f"too old: {', '.join(stale)}"] if stale else []
        parts += ["versions not compared"] if "packaging" in lacking else []
        yield Finding("packages", "problem", "; ".join(parts), EXTRA)
    else:
        yield Finding("packages", "ok", "all installed")
    for name, remedy in OPTIONAL.items():
        found = environment.version(name)
        yield Finding(name, "ok" if found else "missing", found or "not installed", "" if found else remedy)
