//! The pods: what they run as, and what of the node they see.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::tool::{find, for_each_set, render, template};

/// The pod templates of everything that runs, with the names of their owners.
fn pods(objects: &[Value]) -> Vec<(&str, &Value)> {
    let pods: Vec<_> = objects
        .iter()
        .filter(|object| object["spec"]["template"]["spec"].is_object())
        .map(|object| {
            let name = object["metadata"]["name"].as_str().unwrap();
            (name, &object["spec"]["template"]["spec"])
        })
        .collect();
    assert!(pods.len() >= 2);
    pods
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    pod["containers"].as_array().into_iter().flatten()
}

/// The directories of the host that a pod sees.
fn host_paths(pod: &Value) -> BTreeSet<&str> {
    let volumes = pod["volumes"].as_array().into_iter().flatten();
    volumes
        .filter_map(|volume| volume["hostPath"]["path"].as_str())
        .collect()
}

#[test]
fn every_root_file_system_is_read_only_and_only_the_node_part_is_privileged() {
    for_each_set(|set, objects| {
        for (name, pod) in pods(objects) {
            for container in containers(pod) {
                let security = &container["securityContext"];
                assert_eq!(security["readOnlyRootFilesystem"], true, "{set}: {name}");
                let is_node = name.ends_with("-node");
                assert_eq!(security["privileged"] == true, is_node, "{set}: {name}");
                assert_eq!(pod["hostNetwork"] == true, is_node, "{set}: {name}");
                assert_eq!(pod["hostPID"], Value::Null, "{set}: {name}");
                if is_node {
                    continue;
                }
                assert_eq!(security["allowPrivilegeEscalation"], false, "{set}: {name}");
                assert_eq!(security["capabilities"]["drop"][0], "ALL", "{set}: {name}");
                assert_eq!(
                    pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
                    "{set}: {name}"
                );
                if name.ends_with("-agent") {
                    continue;
                }
                assert_eq!(
                    security["capabilities"]["add"],
                    Value::Null,
                    "{set}: {name}"
                );
                assert_eq!(
                    pod["securityContext"]["runAsNonRoot"], true,
                    "{set}: {name}"
                );
            }
        }
    });
}

#[test]
fn the_agent_sees_the_pools_of_its_node_and_nothing_else() {
    let objects = render(&[
        "--set-json",
        r#"pools=[{"name":"a","directory":"/data/a","nodeSelector":{"disk":"a"}},{"name":"b","directory":"/data/b"},{"name":"c","directory":"/data/a","nodeSelector":{"disk":"c"}}]"#,
        "--set-json",
        r#"agent.directories=["/data/c"]"#,
    ]);
    let pod = &find(&objects, "DaemonSet", "hawser-agent")["spec"]["template"]["spec"];
    assert_eq!(
        host_paths(pod),
        BTreeSet::from(["/data/a", "/data/b", "/data/c"])
    );
    for container in containers(pod) {
        for mount in container["volumeMounts"].as_array().unwrap() {
            let path = mount["mountPath"].as_str().unwrap();
            assert!(path.starts_with("/pools/data/"), "{path}");
        }
    }
    // The pool b has no selector: it is everywhere, and so are the agents.
    assert_eq!(pod["affinity"], Value::Null);
}

#[test]
fn agents_run_wherever_at_least_one_pool_is() {
    let objects = render(&[
        "--set-json",
        r#"pools=[{"name":"a","directory":"/a","nodeSelector":{"disk":"a","zone":"1"}},{"name":"b","directory":"/b","nodeSelector":{"disk":"b"}}]"#,
    ]);
    let agent = find(&objects, "DaemonSet", "hawser-agent");
    let terms = &agent["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        ["nodeSelectorTerms"];
    // Terms are alternatives; the expressions of one must all hold.
    let lengths: Vec<_> = terms
        .as_array()
        .unwrap()
        .iter()
        .map(|term| term["matchExpressions"].as_array().unwrap().len())
        .collect();
    assert_eq!(lengths, [2, 1]);
}

#[test]
fn without_a_pool_there_is_no_agent() {
    let objects = render(&["--set-json", "pools=[]"]);
    let daemons: Vec<_> = objects
        .iter()
        .filter(|object| object["kind"] == "DaemonSet")
        .map(|object| object["metadata"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(daemons, ["hawser-node"]);
}

#[test]
fn the_kubelets_directory_is_where_the_values_say() {
    let path = "/var/snap/microk8s/common/var/lib/kubelet";
    let objects = render(&["--set", &format!("kubeletPath={path}")]);
    let pod = &find(&objects, "DaemonSet", "hawser-node")["spec"]["template"]["spec"];
    let container = containers(pod).next().unwrap();
    let arguments = container["args"].as_array().unwrap();
    assert!(arguments.contains(&format!("--kubelet-path={path}").into()));
    let mount = container["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|mount| mount["mountPath"] == path)
        .unwrap();
    assert_eq!(mount["mountPropagation"], "Bidirectional");
    let paths = host_paths(pod);
    for below in ["", "/plugins/csi.hawser.dev", "/plugins_registry"] {
        assert!(
            paths.contains(format!("{path}{below}").as_str()),
            "{paths:?}"
        );
    }
    assert!(
        paths
            .iter()
            .all(|path| !path.starts_with("/var/lib/kubelet"))
    );
}

#[test]
fn settings_of_rolling_go_with_rolling_only() {
    // The API server refuses a Deployment that is recreated and says how to roll.
    let objects = render(&[
        "--set=controller.updateStrategy.type=Recreate",
        "--set=node.updateStrategy.type=OnDelete",
    ]);
    let controller = &find(&objects, "Deployment", "hawser-controller")["spec"]["strategy"];
    assert_eq!(controller, &serde_json::json!({"type": "Recreate"}));
    let node = &find(&objects, "DaemonSet", "hawser-node")["spec"]["updateStrategy"];
    assert_eq!(node, &serde_json::json!({"type": "OnDelete"}));
}

#[test]
fn sockets_fit_where_the_kernel_keeps_their_paths() {
    // The longest that the schema lets through must be refused by it, or fit.
    let longest = format!("/{}", "k".repeat(75));
    let socket = format!("{longest}/plugins_registry/csi.hawser.dev-reg@localhost");
    assert!(socket.len() > 107);
    let refused = template(&["--set", &format!("kubeletPath={longest}")]).unwrap_err();
    assert!(refused.contains("kubeletPath"), "{refused}");
}

#[test]
fn the_csi_driver_is_never_deleted_and_says_what_the_kubelet_must_know() {
    for_each_set(|set, objects| {
        let driver = find(objects, "CSIDriver", "csi.hawser.dev");
        let annotations = &driver["metadata"]["annotations"];
        assert_eq!(annotations["helm.sh/resource-policy"], "keep", "{set}");
        assert_eq!(annotations["helm.sh/hook"], Value::Null, "{set}");
        let spec = &driver["spec"];
        assert_eq!(spec["attachRequired"], true);
        assert_eq!(spec["requiresRepublish"], true);
        assert_eq!(spec["storageCapacity"], true);
        assert_eq!(spec["fsGroupPolicy"], "File");
        assert_eq!(
            spec["volumeLifecycleModes"],
            serde_json::json!(["Persistent"])
        );
    });
}

#[test]
fn an_uninstall_keeps_what_volumes_live_on() {
    let objects = render(&[]);
    for (kind, name) in [
        ("NbdPool", "default"),
        ("ServiceAccount", "hawser-server"),
        ("CSIDriver", "csi.hawser.dev"),
    ] {
        let policy =
            &find(&objects, kind, name)["metadata"]["annotations"]["helm.sh/resource-policy"];
        assert_eq!(policy, "keep", "{kind} {name}");
    }
    // Definitions are in `crds/`, which Helm never deletes from.
    assert!(
        objects
            .iter()
            .all(|object| object["kind"] != "CustomResourceDefinition")
    );
}

#[test]
fn a_storage_class_names_the_secret_that_the_controller_makes() {
    let objects = render(&[]);
    let parameters = &find(&objects, "StorageClass", "hawser")["parameters"];
    for step in ["node-stage", "node-publish"] {
        let key = format!("csi.storage.k8s.io/{step}-secret");
        assert_eq!(
            parameters[format!("{key}-name")],
            "${pv.name}-hawser-client"
        );
        assert_eq!(
            parameters[format!("{key}-namespace")],
            crate::tool::NAMESPACE
        );
    }
}
