"""Settings for all tests."""

import os

import hypothesis

# A change is judged by the same examples wherever it is tested; new ones are found at the developer's desk.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
