# syntax=docker/dockerfile:1.7
# Everything but TensorRT-LLM, in one image. Without arguments it holds CPU torch (tide-pipeline:cpu); with TORCH_INDEX of a CUDA
# build it is the image that trains on the secondary GPUs (tide-pipeline:train). See docker-compose.yml.
FROM python:3.12.11-slim-bookworm AS packages

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tide/bin:$PATH
WORKDIR /app
RUN python -m venv /opt/tide

# Layers from slow to fast: torch, the other packages, (below) our own files. The lock is a constraint: test tools stay outside.
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock --extra-index-url "$TORCH_INDEX" setuptools torch
COPY pyproject.toml README.md ./
COPY tide_pipeline/__init__.py tide_pipeline/__init__.py
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock --no-build-isolation --editable ".[production]"

FROM python:3.12.11-slim-bookworm

ENV PATH=/opt/tide/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 \
    GIT_PYTHON_REFRESH=quiet TIDE_PROJECT_ROOT=/app DAGSTER_HOME=/app/dagster_home
WORKDIR /app
RUN useradd --uid 10001 --create-home tide && install --directory --owner tide --mode 0700 /state

COPY --from=packages /opt/tide /opt/tide
COPY docker docker
COPY engines engines
COPY --chown=tide dagster_home dagster_home
COPY pyproject.toml README.md ./
COPY tide_pipeline tide_pipeline

USER 10001
VOLUME /state
ENTRYPOINT ["sh", "/app/docker/with-secrets.sh"]
CMD ["tide", "--state", "/state", "up", "--foreground"]
