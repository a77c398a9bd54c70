# syntax=docker/dockerfile:1.7
# The serving image: NVIDIA's Triton with TensorRT-LLM, plus our files. Its torch, CUDA and TensorRT-LLM stay as NVIDIA built them:
# missing.py installs only what is not there, without dependencies, and the build fails when torch is another one afterwards.
FROM nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TIDE_PROJECT_ROOT=/app PYTHONPATH=/app
WORKDIR /app

COPY docker/missing.py docker/serve.txt /tmp/
RUN python3 /tmp/missing.py /tmp/serve.txt \
    && useradd --uid 10001 --create-home tide && install --directory --owner tide --mode 0700 /state

COPY docker docker
COPY engines engines
COPY tide_pipeline tide_pipeline

USER 10001
VOLUME /state
ENTRYPOINT ["sh", "/app/docker/with-secrets.sh"]
CMD ["python3", "-m", "tide_pipeline.serve.supervisor", "--config", "/etc/tide/settings.toml", "--state-file", "/tmp/replica.json"]
