# The image of the node agent, the admission service and the program that pods take hold from.
#
# BASE needs Debian's packages of criu >= 4.2 (forky and later) and nothing else. An index of Python
# packages other than pip's default is told by pip's own variables, its authority by PIP_CERT.
#
# Layers, from what changes least: Debian's Python, other people's packages, CRIU and hold, our code.
# A change of our code rebuilds and moves the last one only, a few MB.
ARG BASE=debian:forky-slim

FROM ${BASE} AS tools
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends \
      binutils criu gcc libc6-dev musl-tools python3 python3-pip python3-pycriu python3-setuptools python3-wheel python3-venv >/dev/null
WORKDIR /src
ENV home=/usr/local/lib/ckpt-agent

# Wheels only, each with its hash: what is not in the lock is not in the image, and nothing compiles.
# pip works on the environment from outside, so that it is not in it. pycriu is pure Python, and in
# no index of Python packages. Modules are compiled here, since nothing can be written later, and are
# taken as they are: a file's time may change on its way into a layer.
FROM tools AS packages
ARG PIP_CERT
COPY requirements.lock .
RUN python3 -m venv --without-pip "$home/venv" \
 && python3 -m pip --python "$home/venv/bin/python" install --quiet --no-cache-dir --no-compile \
      --disable-pip-version-check --only-binary :all: --require-hashes -r requirements.lock \
 # Python itself stays (a link); what packages bring to be run by people is no part of ours.
 && find "$home/venv/bin" -type f -delete \
 && cd "$home"/venv/lib/python3*/site-packages \
 && cp -r /usr/lib/python3/dist-packages/pycriu . \
 # The Kubernetes client's second, asynchronous copy (68 MB), and what only that copy imports.
 && rm -r kubernetes/aio aiohttp aiohttp_retry aiosignal frozenlist multidict propcache yarl aiohappyeyeballs \
 && find . -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} + \
 # Debugging symbols (30 MB). What auditwheel has moved about in (*.libs) does not survive strip.
 && find . -name '*.so' -not -path './*.libs/*' -exec strip --strip-unneeded {} + \
 && "$home/venv/bin/python" -B -c 'import pycriu.rpc_pb2, kubernetes.client, kubernetes.stream, numpy, zstandard, grpc' \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash "$home/venv/lib"

FROM tools AS programs
COPY scripts/criu-bundle scripts/
RUN bash scripts/criu-bundle "/made$home/bundle" /usr/sbin/criu && mkdir -p "/made$home/venv/bin" \
 && printf '#!/bin/sh\nexec %s/ld.so --library-path %s %s/criu "$@"\n' \
      "$home/bundle" "$home/bundle" "$home/bundle" > "/made$home/venv/bin/criu" \
 && chmod 755 "/made$home/venv/bin/criu"
COPY hold hold/
RUN bash hold/build "/made$home/hold"

FROM packages AS code
COPY --from=programs /made /
COPY pyproject.toml README.md ./
COPY agent agent/
COPY hooks hooks/
RUN python3 -m pip wheel --quiet --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /wheel . \
 && python3 -m pip --python "$home/venv/bin/python" install --quiet --no-cache-dir --no-compile \
      --disable-pip-version-check --no-deps --no-index --root /made /wheel/*.whl \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -s /made "/made$home/venv/lib" \
 # A CRIU that the agent would refuse must not get into an image.
 && PYTHONPATH=$(echo "/made$home"/venv/lib/python3*/site-packages) "$home/venv/bin/python" \
      -c 'import sys; from agent.engines.criu import probe; probe.probe_version(sys.argv[1:])' "$home/venv/bin/criu"

FROM ${BASE}
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 >/dev/null \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
      /usr/share/man /usr/share/locale /usr/lib/python3*/test /usr/lib/python3*/pydoc_data \
 && ln -s ../lib/ckpt-agent/venv/bin/ckpt-agent /usr/local/bin/ckpt-agent \
 && mkdir -p /etc/ckpt-agent/tls /etc/criu /run/ckpt-agent /var/lib/ckpt-agent/store /var/lib/ckpt-agent/work
COPY --from=packages /usr/local/lib/ckpt-agent /usr/local/lib/ckpt-agent
COPY --from=programs /made /
# The last two: numpy would start a thread for each core of the node, for algebra that nobody does
# here, and have every page that is touched where a large array once was cost two megabytes.
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 LC_ALL=C.UTF-8 \
    OPENBLAS_NUM_THREADS=1 NUMPY_MADVISE_HUGEPAGE=0
ENTRYPOINT ["ckpt-agent"]
COPY --from=code /made /
