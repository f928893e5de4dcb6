#!/usr/bin/env python3
"""A real Kubernetes cluster on one Linux machine, inside namespaces of its own.

    cluster.py run [options] -- COMMAND ...     boot, run COMMAND, tear down, pass its exit status on
    cluster.py up  [options]                    boot and stay
    cluster.py exec -- COMMAND ...              run COMMAND inside a cluster that is up
    cluster.py restart NAME [--signal TERM] [--after SECONDS]
    cluster.py kill NAME [--signal STOP]        also from inside of run and exec
    cluster.py load --image IMAGE               a newer image, into a cluster that is up
    cluster.py status | down

etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy,
CoreDNS and, for each node, a kubelet and a containerd run in private mount,
network and process namespaces. COMMAND runs there too, with KUBECONFIG set and
kubectl on its PATH, and reaches pod and Service addresses directly; nothing
outside can reach the cluster, nor it anything outside. When the first process of
the namespaces ends, the kernel ends all others and drops mounts and interfaces.

Needs root and the programs that build.sh makes. Standard library only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent

NODE_NETWORK = "10.90.0"  # node-1 is .1; the control plane listens there
POD_CIDR = "10.88.0.0/16"
SERVICE_CIDR = "10.96.0.0/16"
API_HOST = f"{NODE_NETWORK}.1"
API_SERVICE = "10.96.0.1"  # the `kubernetes` Service: the first of SERVICE_CIDR
API_URL = f"https://{API_HOST}:6443"
ETCD_URL = "http://127.0.0.1:2379"
AUDIT_POLICY = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
                "rules": [{"level": "Metadata"}]}  # fmt: skip

# Paths that containerd, CNI, the kubelet or kubectl have compiled in. Inside the
# namespaces each is a folder of the state directory.
FIXED_PATHS = ["/run/containerd", "/run/netns", "/var/lib/cni", "/var/lib/kubelet", "/var/log/containers"]
MARK = "trusted.testbed"

# What the kubelet insists on. These belong to the whole machine, so rather than
# set them, files with the wanted values are mounted over them for the kubelet.
KUBELET_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}

CONTAINERD_CONFIG = """\
version = 3
root = "{dir}/containerd/root"
state = "{dir}/containerd/state"
oom_score = 0
disabled_plugins = [
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{dir}/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/containerd/opt"

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "testbed.local/pause:1"

[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  disable_hugetlb_controller = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{bin}"]
    conf_dir = "{dir}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "{bin}/runc"
        Root = "{dir}/runc"
        SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
"""

# One veth pair and one host route a pod. Traffic between pods is routed, so it
# passes kube-proxy's rules without the bridge netfilter module.
CNI_CONFIG = {
    "cniVersion": "1.0.0",
    "name": "testbed",
    "plugins": [
        {
            "type": "ptp",
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": POD_CIDR}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

COREFILE = """\
.:53 {{
    bind {host}
    errors
    ready 127.0.0.1:8181
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
        ttl 5
    }}
}}
"""


def kubelet_config(node: Node, cluster: Cluster) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "healthzBindAddress": node.address,
        "tlsCertFile": str(cluster.pki / f"{node.name}.crt"),
        "tlsPrivateKeyFile": str(cluster.pki / f"{node.name}.key"),
        "authentication": {"x509": {"clientCAFile": str(cluster.pki / "ca.crt")}},
        "containerRuntimeEndpoint": f"unix://{node.dir}/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"{cluster.cgroup_root}/{node.name}",
        "failCgroupV1": False,  # the default refuses a cgroup v1 machine
        "enforceNodeAllocatable": ["none"],
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": False,
        "protectKernelDefaults": True,
        "makeIPTablesUtilChains": False,
        "podLogsDir": str(node.dir / "pod-logs"),
        "volumePluginDir": str(node.dir / "volume-plugins"),
        "clusterDNS": [API_HOST],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        # Short periods: a test should not wait for a timer that a long-lived cluster can afford.
        "syncFrequency": "5s",
        "fileCheckFrequency": "5s",
        "configMapAndSecretChangeDetectionStrategy": "Watch",
        "nodeStatusUpdateFrequency": "2s",
        "nodeStatusReportFrequency": "10s",
        "kubeAPIQPS": 200,
        "kubeAPIBurst": 400,
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
        "maxPods": cluster.args.max_pods,
    }


class Node:
    def __init__(self, number: int, state: Path):
        self.name = f"node-{number}"
        self.address = f"{NODE_NETWORK}.{number}"
        self.dir = state / self.name
        self.mounts = ""  # its mount namespace, once made


class Cluster:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.dir = Path(args.dir).resolve()
        self.bin = Path(args.bin)
        self.pki = self.dir / "pki"
        self.log = self.dir / "log"
        self.kubeconfig = self.dir / "admin.kubeconfig"
        self.cgroup_root = f"/testbed-{self.dir.name}"
        self.nodes = [Node(i + 1, self.dir) for i in range(args.nodes)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.born = time.monotonic()

    # Certificates and kubeconfig files

    def make_pki(self) -> None:
        self.pki.mkdir(parents=True)
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        usage = "keyUsage=critical,keyCertSign,digitalSignature"
        self.openssl("req", "-x509", *new_key, "-days", "3650", "-subj", "/CN=testbed-ca", "-addext", usage,
                     "-keyout", "ca.key", "-out", "ca.crt")  # fmt: skip
        self.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "sa.key")
        self.openssl("ec", "-in", "sa.key", "-pubout", "-out", "sa.pub")
        subjects = {
            "apiserver": "/CN=kube-apiserver",
            "apiserver-kubelet": "/O=system:masters/CN=kube-apiserver-kubelet-client",
            "admin": "/O=system:masters/CN=admin",
            "manager": "/O=system:masters/CN=system:kube-controller-manager",
            "scheduler": "/CN=system:kube-scheduler",
            "proxy": "/CN=system:kube-proxy",
            "addons": "/O=system:masters/CN=testbed-addons",
            **{n.name: f"/O=system:nodes/CN=system:node:{n.name}" for n in self.nodes},
        }
        addresses = ["127.0.0.1", API_HOST, API_SERVICE, *(n.address for n in self.nodes)]
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
                 "kubernetes.default.svc.cluster.local", *(n.name for n in self.nodes)]  # fmt: skip
        alt = ",".join([f"IP:{a}" for a in dict.fromkeys(addresses)] + [f"DNS:{n}" for n in names])
        (self.pki / "leaf.ext").write_text(
            f"subjectAltName={alt}\nextendedKeyUsage=serverAuth,clientAuth\nkeyUsage=digitalSignature\n"
        )
        for serial, (name, subject) in enumerate(subjects.items(), 2):
            self.openssl("req", *new_key, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr")
            self.openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "3650",
                         "-set_serial", str(serial), "-extfile", "leaf.ext", "-out", f"{name}.crt")  # fmt: skip
            if not name.startswith("apiserver"):
                self.write_kubeconfig(name)

    def openssl(self, *args: str) -> None:
        subprocess.run(["openssl", *args], cwd=self.pki, check=True, capture_output=True)

    def write_kubeconfig(self, user: str) -> None:
        def inline(name: str) -> str:
            return base64.b64encode((self.pki / name).read_bytes()).decode()

        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "testbed",
            "clusters": [{"name": "testbed", "cluster": {
                "server": API_URL, "certificate-authority-data": inline("ca.crt")}}],
            "users": [{"name": user, "user": {
                "client-certificate-data": inline(f"{user}.crt"), "client-key-data": inline(f"{user}.key")}}],
            "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": user}}],
        }  # fmt: skip
        (self.dir / f"{user}.kubeconfig").write_text(json.dumps(config, indent=1))

    # Processes

    def spawn(self, name: str, *argv: str | Path) -> None:
        with (self.log / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                cwd="/proc/1/cwd", env=dict(v.split(b"=", 1) for v in Path("/proc/1/environ").read_bytes().split(b"\0") if v),
            )  # fmt: skip
        record = {"pid": self.processes[name].pid, "argv": [str(a) for a in argv]}
        new = self.dir / f"{name}.new"
        new.write_text(json.dumps(record))
        new.rename(self.record(name))

    def record(self, name: str) -> Path:
        return self.dir / "programs" / f"{name}.json"

    def recorded(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.record(name).read_text())
        return record

    def serves(self, name: str) -> bool:
        """Whether a program is ready, by what it says itself; the provisioner and kwok say nothing."""
        program, _, number = name.partition("-node-")
        match program:
            case "etcd":
                return self.healthy(f"{ETCD_URL}/readyz")
            case "kube-apiserver":
                return bool(self.api("GET", "/readyz") == "ok")
            case "kube-controller-manager":
                return self.healthy("https://127.0.0.1:10257/healthz")
            case "kube-scheduler":
                return self.healthy("https://127.0.0.1:10259/healthz")
            case "kube-proxy":
                return self.healthy("http://127.0.0.1:10256/healthz")
            case "coredns":
                return self.healthy("http://127.0.0.1:8181/ready")
            case "containerd":
                node = self.nodes[int(number) - 1]
                return self.ctr(node, "plugins", "ls", "--quiet", "id==cri").returncode == 0
            case "kubelet":
                started = time.gmtime(self.record(name).stat().st_mtime)
                return self.node_is_ready(f"node-{number}", time.strftime("%Y-%m-%dT%H:%M:%SZ", started))
            case _:
                return True

    def wait(self, name: str, ready: Callable[[], bool] | None = None, limit: float = 60) -> None:
        ready = ready or (lambda: self.serves(name))
        start = time.monotonic()
        while True:
            process = self.processes.get(name)
            if process and process.poll() is not None:
                die(f"{name} ended with {process.returncode}, see {self.log / name}.log")
            with contextlib.suppress(OSError, ValueError):
                if ready():
                    break
            if time.monotonic() - start > limit:
                die(f"{name} not ready in {limit} s, see {self.log}")
            time.sleep(0.05)
        self.report(f"{name} ready")

    def finish(self, name: str) -> None:
        """Waits for a process that ends by itself."""
        if self.processes.pop(name).wait():
            die(f"{name} failed, see {self.log / name}.log")
        self.record(name).unlink()
        self.report(f"{name} done")

    def report(self, text: str) -> None:
        print(f"{time.monotonic() - self.born:6.2f} s  {text}", file=sys.stderr, flush=True)

    def api(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        """One request to the API server as cluster admin."""
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(API_URL + path, data, {"Content-Type": kind}, method=method)
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text[:1] == b"{" else text.decode()

    def healthy(self, url: str) -> bool:
        context = ssl.create_default_context()  # unverified: each program makes its own certificate
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with urllib.request.urlopen(url, context=context, timeout=5) as answer:
            return bool(answer.status == 200)

    # Booting

    def boot(self) -> None:
        self.log.mkdir(parents=True)
        self.record("").parent.mkdir()
        self.make_network()
        self.make_pki()
        self.start_etcd()
        self.start_apiserver()
        for node in self.nodes:
            self.start_containerd(node)
        self.wait("kube-apiserver")
        self.start_controllers()
        for node in self.nodes:
            self.start_kubelet(node)
        self.start_network_services()
        self.wait("kube-controller-manager")
        self.wait("kube-scheduler")
        self.wait("default ServiceAccount",
                  lambda: bool(self.api("GET", "/api/v1/namespaces/default/serviceaccounts/default")))  # fmt: skip
        self.start_storage()
        for node in self.nodes:
            self.wait(node.name, partial(self.node_is_ready, node.name))
            self.set_extended_resources(node.name)
        if self.nodes:
            self.wait("coredns")
        self.start_fake_nodes()
        for node in self.nodes:
            self.finish(f"images-{node.name}")

    def make_network(self) -> None:
        ip("link set lo up")
        for node in self.nodes or [Node(1, self.dir)]:
            ip(f"address add {node.address}/32 dev lo")
        # A route, whichever: kube-proxy rewrites the destination, but only of packets that have one.
        ip(f"route add {SERVICE_CIDR} dev lo src {API_HOST}")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def start_etcd(self) -> None:
        self.spawn("etcd", self.bin / "etcd", "--data-dir", self.dir / "etcd", "--log-level=warn",
                   f"--listen-client-urls={ETCD_URL}", f"--advertise-client-urls={ETCD_URL}",
                   "--unsafe-no-fsync", *self.args.etcd_arg)  # fmt: skip

    def start_apiserver(self) -> None:
        self.spawn(
            "kube-apiserver", self.bin / "kube-apiserver",
            f"--etcd-servers={ETCD_URL}",
            f"--advertise-address={API_HOST}",
            "--secure-port=6443",
            f"--tls-cert-file={self.pki}/apiserver.crt",
            f"--tls-private-key-file={self.pki}/apiserver.key",
            f"--client-ca-file={self.pki}/ca.crt",
            f"--requestheader-client-ca-file={self.pki}/ca.crt",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--kubelet-client-certificate={self.pki}/apiserver-kubelet.crt",
            f"--kubelet-client-key={self.pki}/apiserver-kubelet.key",
            f"--kubelet-certificate-authority={self.pki}/ca.crt",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-signing-key-file={self.pki}/sa.key",
            f"--service-account-key-file={self.pki}/sa.pub",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
            "--profiling=false",
            *self.audit_arguments(),
            *self.args.apiserver_arg,
        )  # fmt: skip

    def audit_arguments(self) -> list[str]:
        if not self.args.audit:
            return []
        policy = self.dir / "audit-policy.json"
        policy.write_text(json.dumps(AUDIT_POLICY))
        # The size, in MB, at which it would begin a second file.
        return [f"--audit-policy-file={policy}", f"--audit-log-path={self.log}/audit.jsonl", "--audit-log-maxsize=100000"]

    def start_controllers(self) -> None:
        def delegated(user: str) -> list[str]:
            path = self.dir / f"{user}.kubeconfig"
            return [f"--{x}kubeconfig={path}" for x in ("", "authentication-", "authorization-")]

        self.spawn(
            "kube-controller-manager", self.bin / "kube-controller-manager", *delegated("manager"),
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            f"--root-ca-file={self.pki}/ca.crt",
            f"--service-account-private-key-file={self.pki}/sa.key",
            f"--cluster-signing-cert-file={self.pki}/ca.crt",
            f"--cluster-signing-key-file={self.pki}/ca.key",
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=16s",
            "--pvclaimbinder-sync-period=1s",
            *self.args.manager_arg,
        )  # fmt: skip
        self.spawn("kube-scheduler", self.bin / "kube-scheduler", *delegated("scheduler"),
                   "--bind-address=127.0.0.1", "--leader-elect=false", *self.args.scheduler_arg)  # fmt: skip

    def start_containerd(self, node: Node) -> None:
        (node.dir / "cni").mkdir(parents=True)
        (node.dir / "cni" / "10-testbed.conflist").write_text(json.dumps(CNI_CONFIG))
        config = node.dir / "containerd.toml"
        config.write_text(CONTAINERD_CONFIG.format(dir=node.dir, bin=self.bin))
        # A mount namespace that this containerd and its kubelet share: containers must see what the
        # kubelet mounts (tokens, secrets), and each kubelet needs its own /var/lib/kubelet. An open
        # file holds it, so that it outlives either of them.
        mounts = []
        for key, value in KUBELET_SYSCTLS.items():
            file = node.dir / "sysctl" / key.replace("/", ".")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{value}\n")
            mounts.append(f"mount --bind {file} /proc/sys/{key}")
        (node.dir / "kubelet").mkdir()
        mounts.append(f"mount --bind {node.dir}/kubelet /var/lib/kubelet")
        script = " && ".join([*mounts, "echo", "read _"])
        with subprocess.Popen(["unshare", "--mount", "--propagation=shared", "sh", "-c", script],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:  # fmt: skip
            if not (maker.stdout and maker.stdout.read(1)):
                die(f"the mounts of {node.name} failed")
            node.mounts = f"/proc/1/fd/{os.open(f'/proc/{maker.pid}/ns/mnt', os.O_RDONLY)}"
        name = f"containerd-{node.name}"
        self.spawn(name, "nsenter", f"--mount={node.mounts}", self.bin / "containerd", "--config", config)
        self.wait(name)
        # A large image takes seconds to unpack: meanwhile, boot the rest.
        images = [*sorted(self.bin.parent.glob("images/*.tar")), *self.args.image]
        self.spawn(f"images-{node.name}", *self.importing(node, images))

    def importing(self, node: Node, images: list[Any]) -> list[str]:
        """The command that imports archives and OCI layouts into a node."""
        script = (
            'ctr="$1 --address $2 --namespace k8s.io images import"; shift 2; for image; do '
            'if [ -d "$image" ]; then tar -C "$image" -c . | $ctr - || exit; else $ctr "$image" || exit; fi; done'
        )
        return ["sh", "-c", script, "sh", str(self.bin / "ctr"), f"{node.dir}/containerd.sock", *map(str, images)]

    def ctr(self, node: Node, *args: str) -> subprocess.CompletedProcess[str]:
        ctr = [str(self.bin / "ctr"), "--address", f"{node.dir}/containerd.sock", "--namespace", "k8s.io"]
        return subprocess.run([*ctr, *args], capture_output=True, text=True)

    def start_kubelet(self, node: Node) -> None:
        for folder in cgroup_folders(f"{self.cgroup_root}/{node.name}"):
            folder.mkdir(parents=True, exist_ok=True)
        config = node.dir / "kubelet.json"
        config.write_text(json.dumps(kubelet_config(node, self), indent=1))
        self.spawn(f"kubelet-{node.name}", "nsenter", f"--mount={node.mounts}", self.bin / "kubelet",
                   f"--config={config}", f"--kubeconfig={self.dir}/{node.name}.kubeconfig",
                   f"--hostname-override={node.name}", f"--node-ip={node.address}",
                   f"--cert-dir={node.dir}/kubelet/pki", *self.args.kubelet_arg)  # fmt: skip

    def start_network_services(self) -> None:
        if not self.nodes:
            return
        self.spawn("kube-proxy", self.bin / "kube-proxy", f"--kubeconfig={self.dir}/proxy.kubeconfig",
                   f"--hostname-override={self.nodes[0].name}", "--proxy-mode=nftables", f"--cluster-cidr={POD_CIDR}",
                   "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0",
                   "--conntrack-tcp-timeout-close-wait=0", "--nodeport-addresses=127.0.0.1/32")  # fmt: skip
        corefile = self.dir / "Corefile"
        corefile.write_text(COREFILE.format(host=API_HOST, kubeconfig=self.dir / "addons.kubeconfig"))
        self.spawn("coredns", self.bin / "coredns", "-conf", corefile)

    def start_storage(self) -> None:
        for name, provisioner in {"local": "testbed.local/folder", "small": "testbed.local/disk"}.items():
            default = {"storageclass.kubernetes.io/is-default-class": str(name == "local").lower()}
            self.api("POST", "/apis/storage.k8s.io/v1/storageclasses", {
                "metadata": {"name": name, "annotations": default},
                "provisioner": provisioner,
                "volumeBindingMode": "WaitForFirstConsumer",
                "reclaimPolicy": "Delete",
            })  # fmt: skip
        self.spawn("provisioner", sys.executable, HERE / "provisioner.py", self.dir / "volumes",
                   API_URL, self.pki / "ca.crt", self.pki / "addons.crt", self.pki / "addons.key")  # fmt: skip

    def node_is_ready(self, name: str, since: str = "") -> bool:
        conditions = self.api("GET", f"/api/v1/nodes/{name}")["status"].get("conditions", [])
        ready = (c for c in conditions if c["type"] == "Ready" and c["status"] == "True")
        return any(c["lastHeartbeatTime"] >= since for c in ready)

    def set_extended_resources(self, node: str) -> None:
        """Gives a node resources that only the scheduler counts, such as nvidia.com/gpu."""
        counts = dict(self.args.resource)
        if counts:
            self.api("PATCH", f"/api/v1/nodes/{node}/status", {"status": {"capacity": counts, "allocatable": counts}},
                     "application/merge-patch+json")  # fmt: skip

    def start_fake_nodes(self) -> None:
        """Nodes whose pods KWOK takes through their phases without running anything."""
        if not self.args.fake_nodes:
            return
        for i in range(self.args.fake_nodes):
            name = f"fake-{i + 1}"
            capacity = {"cpu": "64", "memory": "512Gi", "pods": "1000", **dict(self.args.resource)}
            self.api("POST", "/api/v1/nodes", {
                "metadata": {
                    "name": name,
                    "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok"},
                    "annotations": {"kwok.x-k8s.io/node": "fake"},
                },
                "status": {"capacity": capacity, "allocatable": capacity},
            })  # fmt: skip
        self.spawn("kwok", self.bin / "kwok", f"--kubeconfig={self.dir}/addons.kubeconfig",
                   f"--config={HERE}/fake-node-stages.yaml", "--manage-all-nodes=false",
                   "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--cidr=10.89.0.0/16",
                   f"--node-ip={API_HOST}", *self.args.kwok_arg)  # fmt: skip
        self.wait(f"fake-{self.args.fake_nodes}", lambda: self.node_is_ready(f"fake-{self.args.fake_nodes}"))

    # Faults, done from inside of the namespaces

    def alive(self, name: str) -> bool:
        """Whether the process that was started under this name is still that program: ids are used again."""
        record = self.recorded(name)
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{record['pid']}/cmdline").read_text().rstrip("\0").split("\0")
            return bool(words == record["argv"][-len(words) :])  # nsenter becomes what it starts
        return False

    def kill(self, name: str, number: signal.Signals) -> None:
        """Signals a program; waits for its end if the signal is to end it."""
        if self.alive(name):
            pid = self.recorded(name)["pid"]
            os.kill(pid, number)
            stays = number in (signal.SIGSTOP, signal.SIGCONT)
            while not stays and Path(f"/proc/{pid}").exists():
                time.sleep(0.01)

    def restart(self, name: str, number: signal.Signals, after: float) -> None:
        """Ends a program, or with STOP freezes it, and after a while has it run again as it did; waits until it serves."""
        self.kill(name, number)
        time.sleep(after)
        if self.alive(name):
            self.kill(name, signal.SIGCONT)
            self.record(name).touch()
        else:
            self.spawn(name, *self.recorded(name)["argv"])
        self.wait(name)


# Namespaces, and what is done from outside of them


def inside(cluster: Cluster, command: list[str]) -> NoReturn:
    """Process 1 of the namespaces: boots, runs the command, reaps what it inherits, and ends it all by ending."""
    for path in FIXED_PATHS:
        mine = cluster.dir / "fixed" / path.strip("/").replace("/", "-")
        mine.mkdir(parents=True)
        subprocess.run(["mount", "--bind", mine, path], check=True)
    # What the provisioner mounts here is to appear on the nodes.
    volumes = cluster.dir / "volumes"
    volumes.mkdir()
    subprocess.run(["mount", "--bind", "--make-shared", volumes, volumes], check=True)
    cluster.boot()
    main = subprocess.Popen(command, env=environment(cluster))
    (cluster.dir / "ready").touch()
    while True:
        pid, status = os.wait()
        if pid == main.pid:
            sys.exit(shell_status(os.waitstatus_to_exitcode(status)))
        for record in cluster.record("").parent.iterdir():
            if json.loads(record.read_text())["pid"] == pid:
                print(f"testbed: {record.stem} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)


def options_inside() -> list[str]:
    """The options of the cluster whose namespaces this process is in, if it is in any."""
    words = Path("/proc/1/cmdline").read_text().split("\0")
    return words[3 : words.index("--")] if words[1:3] == [str(Path(__file__).resolve()), "inside"] else []


def fault(cluster: Cluster) -> int:
    args = cluster.args
    number = signal.Signals[f"SIG{args.signal}"]
    if not cluster.record(args.name).exists():
        die(f"no program {args.name!r}; there are {', '.join(sorted(r.stem for r in cluster.record('').parent.glob('*')))}")
    if args.what == "kill":
        cluster.kill(args.name, number)
    else:
        cluster.restart(args.name, number, args.after)
    return 0


def environment(cluster: Cluster) -> dict[str, str]:
    return {**os.environ, "KUBECONFIG": str(cluster.kubeconfig), "PATH": f"{cluster.bin}:{os.environ['PATH']}",
            "TESTBED_DIR": str(cluster.dir)}  # fmt: skip


@contextlib.contextmanager
def namespaces(cluster: Cluster, options: list[str], command: list[str], detach: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Starts this script again as the first process of new namespaces."""
    if (cluster.dir / "pid").exists() and Path(f"/proc/{(cluster.dir / 'pid').read_text()}").exists():
        die(f"a cluster is up in {cluster.dir}")
    clean_up(cluster)
    shutil.rmtree(cluster.dir, ignore_errors=True)
    cluster.dir.mkdir(parents=True)
    lock = make_mount_points()

    def die_with_parent() -> None:
        if not detach:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    inner = [sys.executable, str(Path(__file__).resolve()), "inside", *options, "--", *command]
    output = (cluster.dir / "boot.log").open("wb") if detach else None
    process = subprocess.Popen([*unshare, *inner], preexec_fn=die_with_parent, start_new_session=detach,
                               pass_fds=[lock], stdout=output, stderr=output)  # fmt: skip
    os.close(lock)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text().strip():
        time.sleep(0.01)
    if process.poll() is None:
        (cluster.dir / "pid").write_text(children.read_text().split()[0])
    yield process


def run(cluster: Cluster, options: list[str], command: list[str]) -> int:
    with namespaces(cluster, options, command, detach=False) as process:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: process.kill())
        try:
            return shell_status(process.wait())
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            return 130
        finally:
            clean_up(cluster)


def up(cluster: Cluster, options: list[str]) -> int:
    with namespaces(cluster, options, ["sleep", "infinity"], detach=True) as process:
        while not (cluster.dir / "ready").exists():
            if process.poll() is not None:
                clean_up(cluster)
                die((cluster.dir / "boot.log").read_text())
            time.sleep(0.05)
    print((cluster.dir / "boot.log").read_text(), end="")
    return 0


def execute(cluster: Cluster, command: list[str]) -> int:
    pid = (cluster.dir / "pid").read_text()
    enter = ["nsenter", f"--target={pid}", "--mount", "--net", "--pid", f"--wdns={os.getcwd()}", "--"]
    return shell_status(subprocess.call([*enter, *command], env=environment(cluster)))


def down(cluster: Cluster) -> int:
    clean_up(cluster)
    return 0


def status(cluster: Cluster) -> int:
    """Process ids are those inside the namespaces, so read their /proc."""
    script = (
        "import json,sys\n"
        "for file in sys.argv[1:]:\n"
        "  name, pid = file.rpartition('/')[2][:-5], json.load(open(file))['pid']\n"
        "  try:\n"
        "    rss = next(l for l in open(f'/proc/{pid}/status') if l.startswith('VmRSS'))\n"
        "    cpu = open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()\n"
        "    print(f'{name:26} {int(rss.split()[1]) // 1024:5} MiB {(int(cpu[11]) + int(cpu[12])) / 100:7.1f} CPU s')\n"
        "  except (OSError, StopIteration): print(f'{name:26} gone')\n"
    )
    records = sorted(cluster.record("").parent.glob("*.json"), key=os.path.getmtime)
    return execute(cluster, [sys.executable, "-c", script, *map(str, records)])


def clean_up(cluster: Cluster) -> None:
    """Ends the cluster of this state directory if it is there, and removes what the kernel leaves."""
    file = cluster.dir / "pid"
    if file.exists():
        pid = int(file.read_text())
        with contextlib.suppress(OSError):
            if str(cluster.dir).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/ns").exists() and process_state(pid) != "Z":
            time.sleep(0.02)
        file.unlink(missing_ok=True)  # the end of `run` and a `down` may come together
    for _ in range(100):
        tops = [f for f in cgroup_folders(cluster.cgroup_root) if f.exists()]
        for folder in sorted((g for t in tops for g in t.glob("**/")), key=lambda g: -len(g.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if not tops:
            break
        time.sleep(0.05)
    remove_mount_points()


def make_mount_points() -> int:
    """Makes the missing FIXED_PATHS and marks them; returns a lock for the cluster's first process to hold."""
    lock = os.open("/var/lib", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    for path in map(Path, FIXED_PATHS):
        if not path.exists():
            path.mkdir(parents=True)
            os.setxattr(path, MARK, b"")
    return lock


def remove_mount_points() -> None:
    """Removes what make_mount_points made, unless a cluster is up: that would lose its mounts."""
    lock = os.open("/var/lib", os.O_RDONLY)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in FIXED_PATHS:
            if os.path.isdir(path) and MARK in os.listxattr(path):
                os.rmdir(path)
    os.close(lock)


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def cgroup_folders(path: str) -> list[Path]:
    """Where `path` is in each cgroup hierarchy: one with version 2, one a controller with version 1."""
    top = Path("/sys/fs/cgroup")
    hierarchies = [top] if (top / "cgroup.controllers").exists() else [d for d in top.iterdir() if (d / "cgroup.procs").exists()]
    return [h / path.strip("/") for h in hierarchies]


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def shell_status(code: int) -> int:
    return code if code >= 0 else 128 - code


def die(message: str) -> NoReturn:
    sys.exit(f"testbed: {message}")


def resource(text: str) -> tuple[str, str]:
    name, found, quantity = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError("must be NAME=QUANTITY")
    return name, quantity


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=True)
    parser.add_argument("what", choices=["run", "up", "exec", "restart", "kill", "load", "status", "down", "inside"])
    parser.add_argument("name", nargs="?", default="", help="of the program to restart or kill, as `status` lists it")
    parser.add_argument("--signal", choices=["KILL", "TERM", "STOP", "CONT"], default="KILL")
    parser.add_argument("--after", type=float, default=0, help="seconds that a restarted program stays away")
    parser.add_argument("--dir", default="/var/tmp/testbed", help="state directory, emptied at boot")
    parser.add_argument("--bin", help="where the programs are; by default build.sh is asked, and builds them")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that run containers; 0 for none")
    parser.add_argument("--fake-nodes", type=int, default=0, help="nodes that only pretend to")
    parser.add_argument("--max-pods", type=int, default=110)
    parser.add_argument("--resource", type=resource, action="append", default=[], metavar="nvidia.com/gpu=4")
    parser.add_argument("--image", action="append", default=[], help="OCI or Docker archive, or OCI layout, to import")
    parser.add_argument("--audit", action="store_true", help="log every API request's metadata to log/audit.jsonl")
    for program in ("etcd", "apiserver", "manager", "scheduler", "kubelet", "kwok"):
        parser.add_argument(f"--{program}-arg", action="append", default=[], help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options, command = sys.argv[1:], []
    if "--" in options:
        cut = options.index("--")
        options, command = options[:cut], options[cut + 1 :]
    parser = arguments()
    args = parser.parse_intermixed_args(options)
    inner = options_inside() if args.what in ("restart", "kill") else []
    if inner:
        parser.parse_intermixed_args([args.what, args.name, *inner], args)
    if args.bin is None:
        args.bin = subprocess.run([HERE / "build.sh"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        options += ["--bin", args.bin]
    return act(Cluster(args), options[1:], command)


def act(cluster: Cluster, options: list[str], command: list[str]) -> int:
    match cluster.args.what:
        case "run":
            return run(cluster, with_dir(options, cluster), command)
        case "up":
            return up(cluster, with_dir(options, cluster))
        case "inside":
            inside(cluster, command)
        case "exec":
            return execute(cluster, command)
        case "restart" | "kill" if options_inside():
            return fault(cluster)
        case "restart" | "kill":
            return execute(cluster, [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]])
        case "load":
            images = [os.path.realpath(image) for image in cluster.args.image]
            return max(execute(cluster, cluster.importing(node, images)) for node in cluster.nodes)
        case "status":
            return status(cluster)
        case _:
            return down(cluster)


def with_dir(options: list[str], cluster: Cluster) -> list[str]:
    """The options, with the state directory spelt out: clean_up knows its process by it."""
    return [*options, "--dir", str(cluster.dir)]


if __name__ == "__main__":
    sys.exit(main())
