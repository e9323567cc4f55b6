"""`python -m nanogsm.report RUN [RUN ...]` writes the HTML page: see page.py."""

from nanogsm.report.page import main
from nanogsm.run import console

console.entry(main)
