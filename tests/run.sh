#!/usr/bin/env bash
# Install what the tests need, Chromium included, and run them in two processes; further words go to pytest.
# Without an active virtual environment one is made in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    python=.venv/bin/python
fi
"$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt

# A browser of the system is taken where there is one; Debian's is installed by root, Playwright's own otherwise.
has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome || [ -n "${FUSECHAT_CHROMIUM:-}" ]; }
if ! has_browser >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-dejavu >/dev/null
    else
        "$python" -m playwright install chromium
    fi
fi

"$python" -m ruff check .
# In two processes, of which one does everything that needs a browser: two at once would wait for each other.
exec "$python" -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
