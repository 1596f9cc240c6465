%% A fake of the host's module of this name: SHA-256 over fingerprint, quant byte, hash of the
%% context's parameters, and tokens or text. It shares no code with the NIF.
-module(erllama_cache_key).

%% Which kind of host this is: see erllama_fake.
-define(HAS_TOKENS, not defined(TEXT_KEYED)).
-define(HAS_TEXT, defined(TEXT_KEYED) orelse defined(BOTH_KINDS)).

-export([make/1, quant_byte/1, encode_tokens/1]).
-if(?HAS_TOKENS).
-export([make/4]).
-endif.
-if(?HAS_TEXT).
-export([make_text/4, namespace/3]).
-endif.
-export([reset/0, grow/2, names/1]).

%% The byte of every type that the table does not name.
-define(NO_TYPE, 255).

-if(?HAS_TOKENS).
-spec make(#{fingerprint := <<_:256>>, quant_type := atom(), ctx_params_hash := <<_:256>>,
             tokens := [non_neg_integer()]}) -> <<_:256>>.
make(#{fingerprint := <<_:256>> = Fingerprint, quant_type := QuantType,
       ctx_params_hash := <<_:256>> = CtxParamsHash, tokens := Tokens} = Parts)
    when is_atom(QuantType), is_list(Tokens)
->
    erllama_fake:call(make, [Parts], fun() ->
        key(Fingerprint, QuantType, CtxParamsHash, encode(Tokens))
    end).

-spec make(<<_:256>>, atom(), <<_:256>>, binary()) -> <<_:256>>.
make(<<_:256>> = Fingerprint, QuantType, <<_:256>> = CtxParamsHash, Tokens)
    when is_atom(QuantType), is_binary(Tokens)
->
    erllama_fake:call(make, [Fingerprint, QuantType, CtxParamsHash, Tokens], fun() ->
        key(Fingerprint, QuantType, CtxParamsHash, Tokens)
    end).
-else.
-spec make(#{fingerprint := <<_:256>>, quant_type := atom(), ctx_params_hash := <<_:256>>,
             text := binary()}) -> <<_:256>>.
make(#{fingerprint := <<_:256>> = Fingerprint, quant_type := QuantType,
       ctx_params_hash := <<_:256>> = CtxParamsHash, text := Text} = Parts)
    when is_atom(QuantType), is_binary(Text)
->
    erllama_fake:call(make, [Parts], fun() ->
        key(Fingerprint, QuantType, CtxParamsHash, Text)
    end).
-endif.

-if(?HAS_TEXT).
-spec make_text(<<_:256>>, atom(), <<_:256>>, binary()) -> <<_:256>>.
make_text(<<_:256>> = Fingerprint, QuantType, <<_:256>> = CtxParamsHash, Text)
    when is_atom(QuantType), is_binary(Text)
->
    erllama_fake:call(make_text, [Fingerprint, QuantType, CtxParamsHash, Text], fun() ->
        key(Fingerprint, QuantType, CtxParamsHash, Text)
    end).

%% No writer has anything to ask of it.
-spec namespace(<<_:256>>, atom(), <<_:256>>) -> no_return().
namespace(<<_:256>> = Fingerprint, QuantType, <<_:256>> = CtxParamsHash) when is_atom(QuantType) ->
    error({breaks_the_contract, {namespace, Fingerprint, QuantType, CtxParamsHash}}).
-endif.

-spec quant_byte(atom()) -> byte().
quant_byte(QuantType) when is_atom(QuantType) ->
    erllama_fake:call(quant_byte, [QuantType], fun() -> byte(QuantType) end).

-spec encode_tokens([non_neg_integer()]) -> binary().
encode_tokens(Tokens) ->
    erllama_fake:call(encode_tokens, [Tokens], fun() -> encode(Tokens) end).

%%% For tests. None of these is logged.

-spec reset() -> ok.
reset() ->
    persistent_term:put(?MODULE, #{}).

%% Adds a type to the table, as a later version of the host may.
-spec grow(atom(), byte()) -> ok.
grow(QuantType, Byte) ->
    persistent_term:put(?MODULE, (later())#{QuantType => Byte}).

%% Whether some type has this byte: the host's parser refuses all others.
-spec names(byte()) -> boolean().
names(Byte) ->
    Byte =< byte(bf16) orelse lists:member(Byte, maps:values(later())).

later() ->
    persistent_term:get(?MODULE, #{}).

key(Fingerprint, QuantType, CtxParamsHash, Content) ->
    <<_:256>> = crypto:hash(sha256, [Fingerprint, byte(QuantType), CtxParamsHash, Content]).

encode(Tokens) ->
    <<<<Token:32/little>> || Token <- Tokens>>.

byte(f32) -> 0;
byte(f16) -> 1;
byte(q4_0) -> 2;
byte(q4_1) -> 3;
byte(q5_0) -> 4;
byte(q5_1) -> 5;
byte(q8_0) -> 6;
byte(q4_k_m) -> 7;
byte(q4_k_s) -> 8;
byte(q5_k_m) -> 9;
byte(q5_k_s) -> 10;
byte(q6_k) -> 11;
byte(q8_k) -> 12;
byte(q2_k) -> 13;
byte(q3_k_s) -> 14;
byte(q3_k_m) -> 15;
byte(q3_k_l) -> 16;
byte(iq2_xxs) -> 17;
byte(iq2_xs) -> 18;
byte(iq2_s) -> 19;
byte(iq2_m) -> 20;
byte(iq3_xxs) -> 21;
byte(iq3_xs) -> 22;
byte(iq3_s) -> 23;
byte(iq3_m) -> 24;
byte(iq1_s) -> 25;
byte(iq1_m) -> 26;
byte(iq4_nl) -> 27;
byte(iq4_xs) -> 28;
byte(bf16) -> 29;
byte(Other) -> maps:get(Other, later(), ?NO_TYPE).
