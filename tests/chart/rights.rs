//! What each ServiceAccount may do: the promises of `docs/kubernetes/security.md`.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::tool::{NAMESPACE, for_each_set, render};

/// One right: where it holds, and what it allows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    /// In every namespace, and for objects without one.
    everywhere: bool,
    group: String,
    resource: String,
    verb: String,
}

fn strings(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.map(|item| item.as_str().unwrap().to_owned()).collect()
}

/// All that `account` may do, by every binding there is.
fn rights(objects: &[Value], account: &str) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    for binding in objects {
        let everywhere = match binding["kind"].as_str() {
            Some("ClusterRoleBinding") => true,
            Some("RoleBinding") => false,
            _ => continue,
        };
        let subjects = binding["subjects"].as_array().unwrap();
        assert!(subjects.iter().all(|subject| {
            subject["kind"] == "ServiceAccount" && subject["namespace"] == NAMESPACE
        }));
        if !subjects.iter().any(|subject| subject["name"] == account) {
            continue;
        }
        let role = objects
            .iter()
            .find(|object| {
                object["kind"] == binding["roleRef"]["kind"]
                    && object["metadata"]["name"] == binding["roleRef"]["name"]
            })
            .unwrap_or_else(|| panic!("the role of {} is missing", binding["metadata"]["name"]));
        for rule in role["rules"].as_array().unwrap() {
            for group in strings(&rule["apiGroups"]) {
                for resource in strings(&rule["resources"]) {
                    for verb in strings(&rule["verbs"]) {
                        rights.insert(Right {
                            everywhere,
                            group: group.clone(),
                            resource: resource.clone(),
                            verb,
                        });
                    }
                }
            }
        }
    }
    rights
}

#[test]
fn nobody_has_a_wildcard_or_may_raise_their_own_rights() {
    for_each_set(|set, objects| {
        for object in objects {
            if object["kind"] != "ClusterRole" && object["kind"] != "Role" {
                continue;
            }
            let name = &object["metadata"]["name"];
            for rule in object["rules"].as_array().unwrap() {
                let all = [
                    strings(&rule["apiGroups"]),
                    strings(&rule["resources"]),
                    strings(&rule["verbs"]),
                ]
                .concat();
                for forbidden in ["*", "escalate", "bind", "impersonate", "pods/exec"] {
                    assert!(!all.contains(&forbidden.to_owned()), "{set}: {name}");
                }
                assert!(
                    !strings(&rule["apiGroups"]).contains(&"rbac.authorization.k8s.io".to_owned()),
                    "{set}: {name}"
                );
            }
        }
    });
}

#[test]
fn only_the_controller_touches_secrets_and_only_in_its_namespace() {
    for_each_set(|set, objects| {
        for object in objects {
            let Some(rules) = object["rules"].as_array() else {
                continue;
            };
            let touches = rules
                .iter()
                .any(|rule| strings(&rule["resources"]).contains(&"secrets".to_owned()));
            let is_controllers =
                object["kind"] == "Role" && object["metadata"]["name"] == "hawser-controller";
            assert!(
                !touches || is_controllers,
                "{set}: {} {}",
                object["kind"],
                object["metadata"]["name"]
            );
        }
    });
}

#[test]
fn the_node_part_reads_no_secret_and_writes_only_status_and_events() {
    for_each_set(|set, objects| {
        for right in rights(objects, "hawser-node") {
            let Right {
                everywhere,
                group,
                resource,
                verb,
            } = &right;
            let reads = ["get", "list", "watch"].contains(&verb.as_str());
            let allowed = match (group.as_str(), resource.as_str()) {
                ("hawser.dev", "nbdvolumes") => reads && !everywhere,
                ("hawser.dev", "nbdvolumes/status") => {
                    ["get", "patch"].contains(&verb.as_str()) && !everywhere
                }
                // Its own, for the zone; and the claim to which an Event belongs.
                ("", "nodes" | "persistentvolumes") => verb == "get",
                ("" | "events.k8s.io", "events") => ["create", "patch"].contains(&verb.as_str()),
                _ => false,
            };
            assert!(allowed, "{set}: {right:?}");
        }
    });
}

#[test]
fn the_agent_changes_nothing_but_volumes_and_pools_status() {
    for_each_set(|set, objects| {
        for right in rights(objects, "hawser-agent") {
            let reads = ["get", "list", "watch"].contains(&right.verb.as_str());
            let ours = right.group == "hawser.dev";
            let changes = match right.resource.as_str() {
                "nbdvolumes" | "nbdvolumes/status" => ours && !right.everywhere,
                "nbdpools/status" => ours,
                _ => false,
            };
            assert!(
                reads || changes && right.verb != "delete",
                "{set}: {right:?}"
            );
            assert!(right.verb != "create", "{set}: {right:?}");
        }
    });
}

#[test]
fn the_controller_asks_cert_manager_only_where_it_is_to() {
    let asks = |arguments: &[&str]| {
        rights(&render(arguments), "hawser-controller")
            .iter()
            .any(|right| right.group == "cert-manager.io")
    };
    assert!(!asks(&[]));
    assert!(asks(&["--set", "tls.certManager.enabled=true"]));
}

#[test]
fn the_servers_have_no_right_and_no_token() {
    let objects = render(&[]);
    assert_eq!(rights(&objects, "hawser-server"), BTreeSet::new());
    let account = crate::tool::find(&objects, "ServiceAccount", "hawser-server");
    assert_eq!(account["automountServiceAccountToken"], false);
}

#[test]
fn a_hook_may_do_its_work_and_no_other_account_may() {
    let objects = render(&[]);
    let upgrade = rights(&objects, "hawser-upgrade-crds");
    assert!(
        upgrade
            .iter()
            .all(|right| right.resource == "customresourcedefinitions" && right.verb == "patch"),
        "{upgrade:?}"
    );
    let names = strings(
        &crate::tool::find(&objects, "ClusterRole", "hawser-upgrade-crds")["rules"][0]["resourceNames"],
    );
    assert_eq!(names.len(), 3, "{names:?}");
    let guard = rights(&objects, "hawser-guard-uninstall");
    let of = |resource: &str| {
        let mut rights = guard.iter().filter(|right| right.resource == resource);
        rights.all(|right| right.verb == "list" && right.everywhere == (resource != "nbdvolumes"))
    };
    assert!(
        guard.len() == 2 && of("nbdvolumes") && of("volumeattachments"),
        "{guard:?}"
    );
    for account in ["controller", "node", "agent"] {
        let rights = rights(&objects, &format!("hawser-{account}"));
        assert!(
            rights
                .iter()
                .all(|right| right.resource != "customresourcedefinitions")
        );
    }
}
