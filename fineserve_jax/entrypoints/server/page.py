"""The page at `/`: one HTML file whose script asks `/live` every second, and that needs nothing from elsewhere."""

from importlib import resources

PAGE = resources.files("fineserve_jax.entrypoints.server").joinpath("page.html").read_text(encoding="utf-8")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
