"""Install `lg`. Dependencies are listed in requirements.txt only."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

EXTRAS = {
    "export": ["onnx>=1.17,<2", "onnxruntime>=1.20,<2", "onnxscript>=0.5.3,<1"],
    "report": ["cleanlab>=2.7,<3", "grad-cam>=1.5.4,<2"],
    "slurm": ["submitit>=1.5,<2"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
    "sweep": ["optuna>=5,<6"],
    "wandb": ["wandb>=0.19,<1"],
    "mlflow": ["mlflow>=2.20,<4"],
    "trackio": ["trackio>=0.2,<1"],
}
EXTRAS["dev"] = [
    *(item for name in ("export", "report", "slurm", "docs", "sweep") for item in EXTRAS[name]),
    "mypy>=1.11,<3",
    "pytest>=9.0.3,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.5,<4",
    "ruff>=0.6,<1",
    "types-PyYAML>=6.0.12,<7",
    "types-simplejson>=3.19,<5",
]


class WithConfigs(build_py):
    """Copies configs/ into the package; an editable install finds it in the repository."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "lg", "configs")
            shutil.copytree(HERE / "configs", target, dirs_exist_ok=True)


setup(
    name="lg",
    version="0.1.0",
    description="Vision transformers from scratch on tiny datasets, guided by a small frozen CNN",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["lg", "lg.*"]),
    # Type checkers read the annotations of installed packages.
    package_data={"lg": ["py.typed", "tools/report/style.css"]},
    py_modules=["run_net", "precompute_feature"],  # for `python -m run_net`
    cmdclass={"build_py": WithConfigs},
    python_requires=">=3.10,<3.14",
    install_requires=(HERE / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require=EXTRAS,
)
