%% What a key is made of, and the keys that a store makes.
%%
%% @private
-module(erllama_cache_store_key).

-export([parts/2, namespace/1, in/2, of_prefixes/3]).
-export_type([namespace/0]).

-type namespace() :: {Fingerprint :: <<_:256>>, QuantByte :: byte(), CtxParamsHash :: <<_:256>>}.
%% States in different namespaces never share a key.

%% The quant byte of every type that the table does not name.
-define(NO_KNOWN_TYPE, 255).
%% Bytes that any processor hashes within half a millisecond.
-define(FEW_BYTES, 131072).
%% The same for the keys of prefixes, of which a caller may ask for each request, and how many bytes
%% the key of one more prefix counts for.
-define(FEW_BYTES_OF_PREFIXES, 32768).
-define(BYTES_PER_PREFIX, 256).

%% What the key of this map is made of: the namespace, and the tokens or the text.
-spec parts(erllama_cache_host:keyed_by(), erllama_cache_meta:identity()) ->
    {ok, namespace(), Keyed :: binary()} | {error, erllama_cache_meta:invalid()}.
parts(KeyedBy, Meta) ->
    case erllama_cache_meta:check_identity(KeyedBy, Meta) of
        ok ->
            case {namespace(Meta), keyed(KeyedBy, Meta)} of
                {{ok, Namespace}, {ok, Keyed}} -> {ok, Namespace, Keyed};
                {{error, _} = Error, _} -> Error;
                {_, {error, _} = Error} -> Error
            end;
        {error, _} = Error ->
            Error
    end.

-spec namespace(erllama_cache_meta:identity()) ->
    {ok, namespace()} | {error, erllama_cache_meta:invalid()}.
namespace(#{fingerprint := Fingerprint, quant_type := QuantType,
            ctx_params_hash := CtxParamsHash}) ->
    case erllama_cache_nif:quant_byte(QuantType) of
        ?NO_KNOWN_TYPE ->
            %% All unknown types share one byte, and so would their keys: a load of the one would
            %% return the other's state.
            {error, {invalid_meta, quant_type}};
        QuantByte ->
            {ok, {Fingerprint, QuantByte, CtxParamsHash}}
    end.

keyed(text, #{prompt_text := Text}) ->
    {ok, Text};
keyed(tokens, #{tokens := Tokens}) ->
    case erllama_cache_meta:encode_tokens(Tokens) of
        error -> {error, {invalid_meta, tokens}};
        Encoded -> {ok, Encoded}
    end.

-spec in(namespace(), Keyed :: binary()) -> erllama_cache_nif:key().
in({Fingerprint, QuantByte, CtxParamsHash}, Keyed) when byte_size(Keyed) =< ?FEW_BYTES ->
    erllama_cache_nif:key(Fingerprint, QuantByte, CtxParamsHash, Keyed);
in({Fingerprint, QuantByte, CtxParamsHash}, Keyed) ->
    erllama_cache_nif:key_of_many(Fingerprint, QuantByte, CtxParamsHash, Keyed).

%% The keys of the prefixes that end there, in ascending order, one after the other. What is behind
%% the last end is not hashed.
-spec of_prefixes(namespace(), Keyed :: binary(), Ends :: [non_neg_integer()]) -> binary().
of_prefixes(_Namespace, _Keyed, []) ->
    <<>>;
of_prefixes({Fingerprint, QuantByte, CtxParamsHash}, Keyed, Ends) ->
    Work = lists:last(Ends) + ?BYTES_PER_PREFIX * length(Ends),
    case Work =< ?FEW_BYTES_OF_PREFIXES of
        true ->
            erllama_cache_nif:prefix_keys(Fingerprint, QuantByte, CtxParamsHash, Keyed, Ends);
        false ->
            erllama_cache_nif:prefix_keys_of_many(Fingerprint, QuantByte, CtxParamsHash, Keyed,
                                                  Ends)
    end.
