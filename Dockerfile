# Everything `tide up` starts, in one image without a GPU. See docker-compose.yml.
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TIDE_PROJECT_ROOT=/app
WORKDIR /app

COPY requirements.lock ./
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install -r requirements.lock

COPY pyproject.toml README.md ./
COPY tide_pipeline tide_pipeline
COPY engines engines
COPY dagster_home dagster_home
RUN pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home tide && mkdir /state && chown -R tide /state dagster_home

USER tide
VOLUME /state
ENTRYPOINT ["tide", "--state", "/state"]
CMD ["up", "--foreground"]
