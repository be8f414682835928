# docker build -t latentdiff .                            for a CPU
# docker build -t latentdiff --build-arg DEVICE=cuda .    for an NVIDIA GPU; run with --gpus all
# docker run --rm -v "$PWD:/work" latentdiff train --config lora_mini --data.root=photos
# docker run --rm -v "$PWD:/work" -p 127.0.0.1:7860:7860 latentdiff app runs/lora_mini --host 0.0.0.0
FROM python:3.12-slim
ARG DEVICE=cpu
ARG USER_ID=1000
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /src
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY latentdiff latentdiff
RUN if [ "$DEVICE" = cpu ]; then \
        pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch torchvision; \
    fi \
    && pip install -c constraints.txt ".[ui,plots]" \
    && rm -rf /src/* \
    && useradd --uid "$USER_ID" --create-home latentdiff \
    && mkdir /work && chown latentdiff /work
USER latentdiff
WORKDIR /work
EXPOSE 7860
# No shell in between: SIGTERM of `docker stop` reaches the trainer, which finishes its step and saves.
STOPSIGNAL SIGTERM
ENTRYPOINT ["latentdiff"]
CMD ["--help"]
