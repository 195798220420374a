"""Two-level K-FAC on one page of plain PyTorch, for a classifier nn.Sequential(Linear, activation, …, Linear).

    v = Q g + (I − Q A) M (I − A Q) g      with  A = F + λI,   M = K-FAC,   Q = Z E⁻¹ Zᵀ,   E = Zᵀ A Z

g is the gradient, F the Fisher matrix, and the step goes against v. A vector over all parameters is a list with one
matrix [W b] per layer; no matrix as large as F is formed. TwoLevelKFAC is this with choices, checks, more layers.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot


class OnePage:
    def __init__(self, model, λ=0.1, columns=4, lr=0.3, momentum=0.9, decay=0.95, kl_clip=5e-4):
        self.model, self.layers = model, [module for module in model if isinstance(module, nn.Linear)]
        self.λ, self.columns, self.kl_clip = λ, columns, kl_clip
        self.lr, self.momentum, self.decay, self.seen = lr, momentum, decay, 0.0
        self.A, self.G, self.velocity = ([0.0] * len(self.layers) for _ in range(3))

    def step(self, x, y, generator=None):
        # 1. The gradient. With a the input of a layer and a 1 for its bias, and s its output, the gradient of [W b] is
        #    the sum over examples of (∂loss/∂s) aᵀ.
        N, h, a, s = len(x), x, [], []
        for module in self.model:
            if module in self.layers:
                a.append(torch.cat([h, torch.ones_like(h[:, :1])], 1).detach())
            h = module(h)
            s += [h] if module in self.layers else []
        loss = cross_entropy(h, y)
        gradient = [d.T @ a_ for d, a_ in zip(torch.autograd.grad(loss, s, retain_graph=True), a)]

        # 2. The Fisher matrix F = JᵀJ / N. Row n of J is the gradient that example n would have with a label drawn by
        #    the model itself: again g aᵀ in each layer, so that J can be applied and need not be formed.
        p = h.detach().softmax(1)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        g = torch.autograd.grad(h, s, p - one_hot(labels, p.shape[1]))
        J = lambda V: sum(((g_ @ V_) * a_).sum(1) for g_, a_, V_ in zip(g, a, V))
        JT = lambda u: [(u[:, None] * g_).T @ a_ for g_, a_ in zip(g, a)]

        # 3. Level one, K-FAC. A layer's own block of F is taken for G ⊗ A, the second moments of its g and of its a,
        #    averaged over batches; λ is shared out between the two. What lies between layers is dropped.
        self.seen, inverses = self.decay * self.seen + N, []
        for l, (g_, a_) in enumerate(zip(g, a)):
            self.G[l] = self.G[l] + (g_.T @ g_ / N - self.G[l]) * N / self.seen
            self.A[l] = self.A[l] + (a_.T @ a_ / N - self.A[l]) * N / self.seen
            π = (self.A[l].diag().mean() / self.G[l].diag().mean()).sqrt()
            shares = (self.G[l], self.λ**0.5 / π), (self.A[l], self.λ**0.5 * π)
            inverses.append([torch.linalg.inv(X + share * torch.ones_like(X[0]).diag()) for X, share in shares])
        M = lambda R: [G_inverse @ R_ @ A_inverse for (G_inverse, A_inverse), R_ in zip(inverses, R)]

        # 4. Level two: as columns of Z, the few leading eigenvectors w uᵀ of each G ⊗ A. Along these all layers are
        #    solved together, by a matrix E that is no larger than their number.
        columns = []
        for G, A in zip(self.G, self.A):
            (d_G, U_G), (d_A, U_A) = torch.linalg.eigh(G), torch.linalg.eigh(A)
            top = torch.outer(d_G, d_A).flatten().argsort(descending=True, stable=True)[: self.columns]
            columns.append((U_G[:, top // len(d_A)], U_A[:, top % len(d_A)]))
        Z = lambda c: [(W * c_) @ U.T for (W, U), c_ in zip(columns, c.split([W.shape[1] for W, _ in columns]))]
        ZT = lambda R: torch.cat([((W.T @ R_) * U.T).sum(1) for (W, U), R_ in zip(columns, R)])
        JZ = torch.cat([(g_ @ W) * (a_ @ U) for g_, a_, (W, U) in zip(g, a, columns)], 1)
        E = JZ.T @ JZ / N + self.λ * torch.ones_like(JZ[0]).diag()

        # 5. Both, balanced: solve on the columns; let K-FAC treat what that has left, g − A Z c; then undo what K-FAC
        #    has done to the columns.
        c = torch.linalg.solve(E, ZT(gradient))
        v = M([r - Fz - self.λ * z for r, Fz, z in zip(gradient, JT(JZ @ c / N), Z(c))])
        c = c - torch.linalg.solve(E, JZ.T @ J(v) / N + self.λ * ZT(v))
        v = [v_ + z for v_, z in zip(v, Z(c))]

        # 6. The step: so short that lr² vᵀAv, about twice the KL divergence between the model before and after, is at
        #    most kl_clip; then momentum.
        vAv = J(v).square().sum() / N + self.λ * sum(v_.square().sum() for v_ in v)
        scale = (self.kl_clip / (self.lr**2 * vAv)).sqrt().clamp(max=1)
        with torch.no_grad():
            for l, layer in enumerate(self.layers):
                self.velocity[l] = self.momentum * self.velocity[l] + scale * v[l]
                layer.weight -= self.lr * self.velocity[l][:, :-1]
                layer.bias -= self.lr * self.velocity[l][:, -1]
        return loss.item()
