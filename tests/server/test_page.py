"""The page at `/`: live, readable on a phone, and with nothing from elsewhere."""

import html
import json
import re
import shutil
import subprocess

import pytest
from serving import eventually, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(server):
    status, headers, answer = server.ask("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    return headers, answer.decode()


def test_the_page_loads_nothing_and_asks_nobody_else(page):
    headers, text = page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert not re.search(r"https?://|src=|href=|@import|url\(|innerHTML|eval\(", text)


def test_what_it_shows_is_what_the_engine_holds(server):
    before = json.loads(server.ask("/live")[2])
    server.client.completions.create(prompt="abc", model="tiny", max_tokens=9, extra_body={"ttft_slo_s": 1000.0})
    now = eventually(
        lambda: (live := json.loads(server.ask("/live")[2]))["output_tokens"] > before["output_tokens"] and live
    )
    assert (now["running"], now["waiting"], now["predicted_wait_s"]) == (0, 0, 0.0)
    met, all_of_them = (now["attainment"]["ttft"][name] - before["attainment"]["ttft"][name] for name in ("met", "all"))
    assert (met, all_of_them) == (1, 1)
    assert set(now["kv"]) == {"int4", "int8"}
    assert set(now["models"]["tiny"]["kv"]) == {"int4", "int8"}
    assert 0 <= sum(part["reserved"] + part["cached"] for part in now["kv"].values()) <= now["kv_bytes"] == 8 * 2**20


MEASURE = """
<!doctype html><iframe id="frame" src="/" style="border:0;width:WIDTHpx;height:800px"></iframe><script>
const look = () => {
    const page = frame.contentDocument, root = page.documentElement;
    if (!page.getElementById("tiles") || !page.getElementById("tiles").children.length) return setTimeout(look, 50);
    document.title = JSON.stringify({
        wide: root.scrollWidth, state: page.getElementById("state").textContent,
        tiles: [...page.querySelectorAll(".tile")].map(tile => tile.textContent),
        bars: [...page.querySelectorAll(".bar span")].map(bar => [bar.title, bar.getBoundingClientRect().width]),
        headings: [...page.querySelectorAll("h2")].map(heading => heading.textContent),
        targets: page.getElementById("targets").textContent,
        font: parseFloat(page.defaultView.getComputedStyle(page.body).fontSize),
    });
};
look();
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_live_without_scrolling_sideways(llm, tmp_path, width):
    """While a request runs; in a frame of that width. What the browser measured stands in the title."""
    with serving(llm) as server:
        server.client.completions.create(prompt="abc", model="tiny", max_tokens=20, extra_body={"tpot_slo_s": 1000.0})
        frame = MEASURE.replace("WIDTH", str(width)).strip()
        found = measured(server, frame, tmp_path)
    assert found["wide"] <= width
    assert found["font"] >= 16
    assert found["state"] == "live, every second"
    assert found["tiles"][:2] == ["0running", "0waiting"]
    assert found["headings"] == ["KV memory by precision", "tiny (fp32 weights)", "Latency targets"]
    assert "further tokens: 100.0 % of 1 prompts in time" in found["targets"]
    assert {title.split(":")[0] for title, _ in found["bars"]} == {"int4", "int8"}


def measured(server, frame, tmp_path):
    """What a page of the same origin, which holds that frame, writes in its title."""
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    routes = server.server.config.app
    routes.router.routes.append(Route("/frame", lambda request: HTMLResponse(frame)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *flags, f"{server.url}/frame"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search("<title>(.*)</title>", done.stdout).group(1)))
