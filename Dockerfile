# The service with its demo model, for CPU and GPU: torch from PyPI carries CUDA on x86-64 and runs without a GPU too.
# A smaller CPU-only image takes torch's CPU wheels: --build-arg PIP_EXTRA_INDEX_URL=<torch's index of CPU wheels>.
# Other models come by volume, as folders under /models or in the hub's cache under /cache.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# pip reads these two by itself; the second is for a folder of wheels that the builder mounts.
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv
WORKDIR /src
# Dependencies before source: a change of code does not install torch again. The lock pins what pyproject.toml asks for.
COPY pyproject.toml requirements.lock ./
RUN /opt/venv/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > dependencies.txt \
    && /opt/venv/bin/pip install -r dependencies.txt -c requirements.lock
COPY README.md LICENSE ./
COPY service service
RUN /opt/venv/bin/pip install --no-deps .

FROM ${PYTHON_IMAGE}
# Triton builds what launches a kernel with a C compiler, once; without one the GPU runs plain operators.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
# All that is ever written goes to /cache, so the root may be read-only. Group 0 may write there: some clusters run
# images under a random user of that group.
RUN install -d -m 0775 -o 10001 -g 0 /cache && install -d /models
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/cache \
    TMPDIR=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/kernels \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MGPT_HOST=0.0.0.0
VOLUME ["/cache"]
# By number, so that an orchestrator can see that it is not root.
USER 10001:0
EXPOSE 8000
# Alive, not ready: what is unhealthy may be killed, and a model that is still loading must not be.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["megatron-gpt2"]
CMD ["serve"]
