"""Maps the repository's top-level folders to import packages.

`engine/` is the package `alpenglow`, `kernels/` is `alpenglow.kernels`, `export/` is
`alpenglow.export`. Everything else about the package stands in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = {"alpenglow": "engine", "alpenglow.kernels": "kernels", "alpenglow.export": "export"}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
]

setup(packages=packages, package_dir=dict(FOLDERS))
