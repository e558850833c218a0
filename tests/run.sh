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
# What needs a browser runs beside the rest: it waits half of its time. Its words come at the end.
unset PYTHONDONTWRITEBYTECODE  # else every command that a test starts compiles the whole project anew
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # threads of two processes would wait for each other
browser_log=$(mktemp)
trap 'rm -f "$browser_log"' EXIT
"$python" -m pytest -m "browser or long" "$@" >"$browser_log" 2>&1 &
rest=0 browser=0
"$python" -m pytest -m "not browser and not long" "$@" || rest=$?
wait $! || browser=$?
cat "$browser_log"
[ "$rest" != 5 ] || [ "$browser" != 5 ] || exit 5  # 5: there was nothing to run
for status in "$rest" "$browser"; do
    [ "$status" = 0 ] || [ "$status" = 5 ] || exit "$status"
done
