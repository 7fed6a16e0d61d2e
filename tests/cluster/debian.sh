# Debian packages for the test cluster: the machine's own mirror and key, other suites, nothing
# installed that the machine did not have to have. Sourced by the scripts beside it.
# shellcheck shell=bash

DEBIAN_KEYS=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { say "$1"; [ -z "${2:-}" ] || say "$2"; exit 7; }

debian_mirror() { # the mirror that this machine already trusts
  local mirror
  mirror=$(sed -nE 's/^URIs: *(\S+).*/\1/p; s/^deb +(\[[^]]*\] +)?(\S+\/debian\/?) .*/\2/p' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
    grep -m1 -E '/debian/?$' || true)
  [ -n "$mirror" ] || die "found no Debian mirror in /etc/apt" "the cluster is built on Debian; run it there"
  echo "$mirror"
}

need_program() { # PROGRAM=PACKAGE...: installs from the machine's own suite what is missing
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || PATH=$PATH:/usr/sbin command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "missing here: ${missing[*]}" "install them and repeat"
  say "installing ${missing[*]}"
  apt-get update -qq -o Acquire::Retries=6
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Acquire::Retries=6 --no-install-recommends "${missing[@]}" >/dev/null
}

unpack_packages() { # SUITE DIRECTORY PACKAGE...: packages of another suite, unpacked, without dependencies
  local suite=$1 into=$2 apt; shift 2
  apt=$(mktemp -d); mkdir -p "$apt/"{etc,state/lists/partial,cache/archives/partial} "$into"; : > "$apt/status"
  # A testing suite's Release file may have expired; its signature is still checked.
  echo "deb [check-valid-until=no signed-by=$DEBIAN_KEYS] $(debian_mirror) $suite main" > "$apt/etc/sources.list"
  local opts=(-qq -o Acquire::Retries=6 -o "Dir::State=$apt/state" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache"
    -o "Dir::Etc::sourcelist=$apt/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferencesparts=/dev/null -o APT::Sandbox::User=root)
  apt-get "${opts[@]}" update
  (cd "$apt" && apt-get "${opts[@]}" download "$@")
  local deb
  for deb in "$apt"/*.deb; do dpkg-deb -x "$deb" "$into"; done
  rm -rf "$apt"
}

debian_root() { # SUITE DIRECTORY PACKAGES(comma separated) [CUSTOMIZE HOOK]: a minimal Debian in a directory
  local suite=$1 into=$2 packages=$3 hook=${4:-true} log try
  log=$(mktemp)
  for try in 1 2 3; do # a mirror that is being updated fails, and is whole a moment later
    rm -rf "$into.part"
    if mmdebstrap --quiet --mode=root --variant=minbase --keyring="$DEBIAN_KEYS" \
      --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Retries "5"' \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
      --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
      ${packages:+--include="$packages"} --customize-hook="$hook" \
      "$suite" "$into.part" "$(debian_mirror)" > "$log" 2>&1; then
      rm -rf "$into" "$log"; mv "$into.part" "$into"
      return 0
    fi
    tail -20 "$log" >&2
    [ "$try" = 3 ] || { say "trying again to make the Debian root ${into##*/}"; sleep $((try * 10)); }
  done
  rm -rf "$into.part" "$log"; die "could not make the Debian root ${into##*/}"
}
