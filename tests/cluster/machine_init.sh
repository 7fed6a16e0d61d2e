#!/bin/bash
# The first process of a machine of the test cluster: sets up its mounts inside the namespaces that
# it was started in, says its pid (as the parent's /proc numbers it), then reaps what is orphaned.
#   machine_init.sh control-plane NAME GROUP STATE
#   machine_init.sh node NAME GROUP STATE ROOT SHARED BIN
# GROUP is the machine's control group, STATE the machine's own directory on a real disk, ROOT the Debian root that all nodes start from,
# SHARED a directory that all nodes see, BIN Kubernetes' programs.
set -euo pipefail
kind=$1 name=$2 group=$3 state=$4
read -r pid _ < /proc/self/stat # the mount is still the parent's
exec 9> "$state/pid.part"
hostname "$name"
ip link set lo up

if [ "$kind" = node ]; then
  lower=$5 shared=$6 bin=$7 root=$state/root
  mkdir -p "$state"/{root,upper,work,log,services,kubelet,containerd,agent}
  mount -t overlay overlay -o "lowerdir=$lower,upperdir=$state/upper,workdir=$state/work" "$root"
  mkdir -p "$root"/var/lib/{kubelet,containerd,ckpt-agent} "$root"/srv/shared "$root"/etc/{criu,cni/net.d,containerd,kubernetes}
  mount -t proc proc "$root/proc"
  mount -t sysfs sysfs "$root/sys"
  mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs -o mode=755 tmpfs "$root/run"
  mkdir "$root/run/services"
  # What a real node keeps on its disk does not lie on overlayfs here either.
  mount --bind "$state/kubelet" "$root/var/lib/kubelet"
  mount --bind "$state/containerd" "$root/var/lib/containerd"
  mount --bind "$state/agent" "$root/var/lib/ckpt-agent"
  mount --bind "$state/log" "$root/var/log"
  mount --bind "$state/services" "$root/run/services"
  mount --bind -o ro "$bin" "$root/usr/local/bin"
  mount --bind "$shared" "$root/srv/shared"
  printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
  cd "$root"
  mkdir -p .old
  pivot_root . .old
  umount -l /.old
  rmdir /.old
  # Only now: pivot_root refuses a shared parent. Pods' mounts and the node's reach each other.
  mount --make-rshared /
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  for controller in /sys/fs/cgroup/*/; do
    mountpoint -q "$controller" || continue
    mkdir -p "$controller/$group"
    # Version 1's cpuset starts empty, and an empty one takes no process.
    for file in cpuset.cpus cpuset.mems; do
      [ ! -e "$controller/$file" ] || cat "$controller/$file" > "$controller/$group/$file"
    done
  done
  sysctl -qw net.ipv4.ip_forward=1
else
  mkdir -p "$state"/{log,services}
  mount -t proc proc /proc
  mount -t tmpfs -o mode=755 tmpfs /run
fi

printf '%s\n' "$pid" >&9
exec 9>&-
trap 'exit 0' TERM
while :; do # bash reaps what is reparented to it
  sleep 3600 &
  wait $! || true
done
