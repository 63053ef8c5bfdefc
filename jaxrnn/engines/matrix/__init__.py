"""The engine of matrix recurrences, S_t = (diag(a_t) + u_t w_tᵀ) S_{t-1} + k_t v_tᵀ."""
