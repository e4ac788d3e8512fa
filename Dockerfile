# The one image of all roles.
#
#   docker build -t hawser:0.1.0 .                                    from a clean checkout
#   docker build -t hawser:0.1.0 --target runtime -f Dockerfile DIR   from a DIR that holds a built `hawser` and nothing else
#
# Both end in the same files; the second is for those who compiled already.

FROM docker.io/library/debian:trixie-slim AS base
# What the node part runs: mkfs, fsck, growing, blkid, mount and modprobe. xfsprogs wants Python and ICU for xfs_scrub, which
# we never run: ICU is most of what this would weigh, and an image that is privileged on every node should not have an
# interpreter for whoever breaks into it, nor a program that raises its caller's rights.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        btrfs-progs e2fsprogs kmod mount util-linux xfsprogs \
    && dpkg-query -W -f '${db:Status-Status} ${Package}\n' '*python3*' 'libdbus-1*' 'libglib2.0*' 'libicu*' \
        | sed -n 's/^installed //p' | xargs -r dpkg --purge --force-depends \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /tmp/*
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Hawser" \
    org.opencontainers.image.description="Block volumes over NBD, always inside mutually authenticated TLS" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# Nobody's: the agent and the node part are given root by their DaemonSets, the rest never needs it.
USER 65532:65532
ENTRYPOINT ["/usr/bin/hawser"]

FROM docker.io/library/rust:1.95-slim-trixie AS build
# The image's own toolchain: the one in rust-toolchain.toml is the same, with parts for development.
ENV RUSTUP_TOOLCHAIN=1.95.0
# Without what only a debugger reads, which would be half of the image.
ENV CARGO_PROFILE_RELEASE_DEBUG=none
WORKDIR /build
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
# What was downloaded and what was compiled stay with the builder: a change of ours compiles nothing but ours, and a change of
# a dependency that one. cargo goes by time, and a checkout may be older than what was compiled last.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target,sharing=locked \
    touch build.rs src/main.rs src/lib.rs \
    && cargo build --locked --release --bin hawser \
    && cp target/release/hawser /usr/bin/hawser

FROM base AS runtime
COPY --chmod=755 hawser /usr/bin/hawser

FROM base
COPY --from=build --chmod=755 /usr/bin/hawser /usr/bin/hawser
