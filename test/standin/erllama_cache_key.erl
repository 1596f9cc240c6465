%% Stands in for the host's module of this name: the key of the contract.
-module(erllama_cache_key).
-export([make/1, make/4, quant_byte/1, encode_tokens/1]).

-spec make(map()) -> <<_:256>>.
make(#{fingerprint := <<_:256>> = Fp, quant_type := Quant, ctx_params_hash := <<_:256>> = Ctx,
       tokens := Tokens}) ->
    make(Fp, Quant, Ctx, encode_tokens(Tokens)).

-spec make(<<_:256>>, atom(), <<_:256>>, binary()) -> <<_:256>>.
make(Fp, Quant, Ctx, Tokens) ->
    erllama_cache_nif:key(Fp, quant_byte(Quant), Ctx, Tokens).

-spec quant_byte(atom()) -> byte().
quant_byte(Quant) -> erllama_cache_nif:quant_byte(Quant).

-spec encode_tokens([integer()]) -> binary().
encode_tokens(Tokens) -> <<<<Token:32/little>> || Token <- Tokens>>.
