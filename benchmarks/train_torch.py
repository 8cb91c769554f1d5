"""The torch contenders of train.py: nanoGPT's decoder and torch.nn.Transformer."""

import os

import train_task as task


def eager(config, compiled=False):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    if "source" in config:
        model, batch = seq2seq(config)
    else:
        model, rows = decoder(config), torch.from_numpy(task.decoder_text(config))
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    model, batch = model.to(device), [x.to(device) for x in batch]
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": task.DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=task.RATE, betas=(task.B1, task.B2), eps=task.EPS, fused=True
    )
    forward = torch.compile(model) if compiled else model
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def step():
        with torch.autocast(device, torch.bfloat16, enabled="dtype" in config):
            loss = forward(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    return task.timed(step)


def compiled(config):
    return eager(config, compiled=True)


def decoder(config):
    """Builds nanoGPT's decoder with torch's fused attention."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    d, heads, t = config["d_model"], config["heads"], config["t"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            b, t, _ = x.shape
            qkv = self.qkv(self.norm_1(x)).view(b, t, 3, heads, d // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(config["vocab"], d), nn.Embedding(t, d)
            self.blocks = nn.ModuleList(Block() for _ in range(config["layers"]))
            self.norm = nn.LayerNorm(d)

        def forward(self, tokens, targets):
            places = torch.arange(tokens.shape[1], device=tokens.device)
            x = self.tokens(tokens) + self.positions(places)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model, w = Decoder(), task.decoder_weights(config)
    with torch.no_grad():
        model.tokens.weight.copy_(torch.from_numpy(w["tokens"]))
        model.positions.weight.copy_(torch.from_numpy(w["positions"]))
        for i, block in enumerate(model.blocks):
            for name in ("qkv", "out", "up", "down"):
                layer = getattr(block, name)
                layer.weight.copy_(torch.from_numpy(w[name][i].T))
                layer.bias.zero_()
    return model


def seq2seq(config):
    """Builds torch.nn.Transformer with tables of tokens and positions and an output layer."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    d, v, n, w = config["d_model"], config["vocab"], config["layers"], task.seq2seq_weights(config)

    class EncoderDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.src, self.tgt = nn.Embedding(v, d), nn.Embedding(v, d)
            self.src_positions = nn.Embedding(config["source"], d)
            self.tgt_positions = nn.Embedding(config["t"], d)
            self.body = nn.Transformer(
                d, config["heads"], n, n, 4 * d, dropout=0.0, batch_first=True
            )
            self.head = nn.Linear(d, v)
            causal = nn.Transformer.generate_square_subsequent_mask(config["t"])
            self.register_buffer("causal", causal)

        def forward(self, src, tgt, targets):
            x = self.src(src) + self.src_positions.weight
            y = self.tgt(tgt) + self.tgt_positions.weight
            hidden = self.body(x, y, tgt_mask=self.causal, tgt_is_causal=True)
            return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())

    def fill(attention, maps):
        attention.in_proj_weight.copy_(torch.cat([torch.from_numpy(x.T) for x in maps[:3]]))
        attention.out_proj.weight.copy_(torch.from_numpy(maps[3].T))
        attention.in_proj_bias.zero_()
        attention.out_proj.bias.zero_()

    model = EncoderDecoder()
    with torch.no_grad():
        for name in ("src", "tgt", "src_positions", "tgt_positions"):
            getattr(model, name).weight.copy_(torch.from_numpy(w[name]))
        model.head.weight.copy_(torch.from_numpy(w["head"].T))
        model.head.bias.zero_()
        for stack in ("encoder", "decoder"):
            for i, layer in enumerate(getattr(model.body, stack).layers):
                fill(layer.self_attn, w[stack][i])
                if stack == "decoder":
                    fill(layer.multihead_attn, w["cross"][i])
                layer.linear1.weight.copy_(torch.from_numpy(w[f"{stack}_up"][i].T))
                layer.linear2.weight.copy_(torch.from_numpy(w[f"{stack}_down"][i].T))
                layer.linear1.bias.zero_()
                layer.linear2.bias.zero_()
    src, tgt = (torch.from_numpy(x) for x in task.seq2seq_text(config))
    return model, (src, tgt[:, :-1].contiguous(), tgt[:, 1:].contiguous())
