//! CSI calls: how many there were of each method, what they were answered, and how long that took.

use std::fmt::Debug;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::time::Instant;
use tonic::Code;

use super::Exposition;

/// What a method that is not served is called: callers must not make up labels.
const OTHER: &str = "other";

/// Cheap to clone; all clones count together.
#[derive(Debug, Clone)]
pub struct Calls(Family<Call, Histogram>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    method: String,
    code: String,
}

impl Default for Calls {
    fn default() -> Self {
        // From what answers out of memory, 10 ms, to what the kubelet waits for at most, some two minutes.
        let histogram = || Histogram::new(exponential_buckets(0.01, 3.0, 9));
        Self(Family::new_with_constructor(histogram))
    }
}

impl Calls {
    pub(crate) fn tell(&self, exposition: &mut Exposition) {
        exposition.add(
            "csi_call_seconds",
            "CSI calls, by method and gRPC code; Cancelled are those for which nobody waited any more.",
            self.0.clone(),
        );
    }
}

/// Measures each call that passes, in a [`axum::middleware::from_fn_with_state`].
pub(crate) async fn observe(State(calls): State<Calls>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let mut underway = Underway {
        calls,
        method: path.rsplit('/').next().unwrap_or_default().to_owned(),
        code: Code::Cancelled,
        begun: Instant::now(),
    };
    let response = next.run(request).await;
    // An error is in the head already; what has none is told at the end of a body that is made.
    let status = response.headers().get("grpc-status");
    underway.code = status.map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()));
    response
}

/// A call, which ends when this is dropped: with an answer, or because its caller is gone.
struct Underway {
    calls: Calls,
    method: String,
    code: Code,
    begun: Instant,
}

impl Drop for Underway {
    fn drop(&mut self) {
        let method = match self.code {
            Code::Unimplemented => OTHER.to_owned(),
            _ => std::mem::take(&mut self.method),
        };
        let code = format!("{:?}", self.code);
        let seconds = self.begun.elapsed().as_secs_f64();
        let histogram = self.calls.0.get_or_create(&Call { method, code });
        histogram.observe(seconds);
    }
}
