// Diagonal plus low rank, S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, and its gradients.
#include "low_rank.h"

using namespace low_rank;

KERNEL(dplr_forward, LowRankForward) {
  arguments.in.by_channel ? low_rank_forward<LowRankRule, ChannelDecay>(arguments)
                          : low_rank_forward<LowRankRule, TokenDecay>(arguments);
}

KERNEL(dplr_backward, LowRankBackward) {
  arguments.in.by_channel ? low_rank_backward<LowRankRule, ChannelDecay>(arguments)
                          : low_rank_backward<LowRankRule, TokenDecay>(arguments);
}
