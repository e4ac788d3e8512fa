//! The cluster itself, before the driver is blamed for anything.

use anyhow::{Result, ensure};

use super::{Scenario, When};
use crate::kubectl::PATIENCE;
use crate::report::step;
use crate::testbed::Testbed;
use crate::until;

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario::new(
    "smoke::a_pod_on_each_node",
    When::First,
    a_pod_on_each_node,
)];

fn a_pod_on_each_node(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.kubectl.create_namespace("smoke")?;
    for node in &testbed.nodes {
        let name = format!("pod-{}", node.name);
        kubectl.apply(&format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: pod, image: 'hawser.test/pod:1', imagePullPolicy: Never, command: [/bin/sh, -c, 'echo started; exec sleep 1000000']}}
",
            node.name
        ))?;
    }
    let mut addresses = Vec::new();
    for node in &testbed.nodes {
        let name = format!("pod-{}", node.name);
        let pod = step(&format!("{name} is ready"), || {
            kubectl.until_pod_ready(&name)
        })?;
        addresses.push(
            pod["status"]["podIP"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        );
        step("its log can be read", || {
            until("it says what it should", PATIENCE, || {
                Ok((kubectl.run(&["logs", &name])? == "started\n").then_some(()))
            })
        })?;
    }
    step("pods reach each other", || {
        kubectl
            .exec("pod-node1", &format!("ping -c 1 -W 5 {}", addresses[1]))
            .map(drop)
    })?;
    step("a Service's address works in a pod", || {
        let printed = kubectl.exec(
            "pod-node2",
            "wget -q -T 5 --no-check-certificate -O - https://$KUBERNETES_SERVICE_HOST/livez",
        )?;
        ensure!(printed.trim() == "ok", "{printed:?}");
        Ok(())
    })?;
    kubectl.delete("namespace", "smoke")
}
