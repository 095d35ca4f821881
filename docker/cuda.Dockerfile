# fastuft on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t fastuft:cuda .
#                         docker run --rm --gpus all --shm-size 8g -v "$PWD:/home/user/data" fastuft:cuda doctor
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
WORKDIR /src
COPY . .
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv g++ && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /build
ENV PATH=/build/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0 setuptools==84.2.1 wheel==0.48.0 cmake==4.4.5 ninja==1.13.2 \
    && FASTUFT_BUILD=cuda pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# Triton compiles its kernels at run time: it needs a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/fastuft && useradd --create-home --uid 1001 user
ENV PATH=/opt/fastuft/bin:$PATH
COPY --from=build /wheels /wheels
COPY constraints.txt /constraints.txt
RUN pip install --no-cache-dir torch==2.13.0 \
    && pip install --no-cache-dir --constraint /constraints.txt "fastuft[train-cu13] @ file://$(ls /wheels/*.whl)"
USER 1001
WORKDIR /home/user
ENTRYPOINT ["fastuft"]
CMD ["help"]
