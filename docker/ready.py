"""The container's health check: exits 0 when /readyz answers 200. Knows only the port."""

import os
import sys
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('MANIFOLD_PORT', '8080')}/readyz"
try:
    urllib.request.urlopen(url, timeout=4).close()
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"{url}: {error}")
