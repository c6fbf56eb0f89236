// The delta rule, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T with S' = e^{g_t} S_{t-1}, and its gradients.
#include "low_rank.h"

using namespace low_rank;

KERNEL(delta_rule_forward, LowRankForward) {
  arguments.in.by_channel ? low_rank_forward<DeltaRule, ChannelDecay>(arguments)
                          : low_rank_forward<DeltaRule, TokenDecay>(arguments);
}

KERNEL(delta_rule_backward, LowRankBackward) {
  arguments.in.by_channel ? low_rank_backward<DeltaRule, ChannelDecay>(arguments)
                          : low_rank_backward<DeltaRule, TokenDecay>(arguments);
}
