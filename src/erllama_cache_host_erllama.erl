%% @doc The application `erllama' as a host: its own modules, called by name. They exist inside
%% `erllama' only.
-module(erllama_cache_host_erllama).
-behaviour(erllama_cache_host).

-export([identify/1, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).

%% These call modules that exist inside erllama only, which dialyzer reports from OTP 26 on.
-if(?OTP_RELEASE >= 26).
-dialyzer({no_unknown, [identify/1, reserve/4, root/1, check/3, mark_published/4, announce/6,
                        cancel/3, count/2]}).
-endif.

%% The slots of erllama's counters that a writer adds to.
-define(SAVES_COLD, 4).
-define(SAVES_CONTINUED, 5).
-define(SAVES_FINISH, 6).
-define(SAVES_EVICT, 7).
-define(SAVES_SHUTDOWN, 8).
-define(DUPLICATE_DROPPED, 16).

%% The quant byte of all types that the host's table does not name.
-define(NO_KNOWN_TYPE, 255).

%% @private
%% Key and quant byte are asked of the host: its table may have grown since this was written, and
%% a key of our own making would be one it cannot find.
identify(#{fingerprint := Fingerprint, quant_type := QuantType, ctx_params_hash := CtxParamsHash,
           tokens := Tokens}) ->
    case {erllama_cache_key:quant_byte(QuantType), erllama_cache_meta:are_tokens(Tokens)} of
        {?NO_KNOWN_TYPE, _} ->
            %% The host's parser refuses such a file and deletes it, but its row would stay: the key
            %% would count as saved and never load.
            {error, {unknown_quant_byte, ?NO_KNOWN_TYPE}};
        {_, false} ->
            {error, {invalid_meta, tokens}};
        {QuantByte, true} ->
            Encoded = erllama_cache_key:encode_tokens(Tokens),
            Key = erllama_cache_key:make(Fingerprint, QuantType, CtxParamsHash, Encoded),
            {ok, {Key, QuantByte, Encoded}}
    end.

%% @private
reserve(_TierSrv, Tier, Key, _Size) ->
    erllama_cache_meta_srv:reserve_save(Key, Tier, self()).

%% @private
root(TierSrv) ->
    try
        erllama_cache_disk_srv:dir(TierSrv)
    catch
        %% The server answers when it has read what others load, and the caller is the process that
        %% decodes tokens: it must neither wait for all that nor die of it.
        exit:{timeout, _} -> {error, tier_busy}
    end.

%% @private
check(_TierSrv, Key, Token) ->
    erllama_cache_meta_srv:check_reservation(Key, Token).

%% @private
mark_published(_TierSrv, Key, Token, Root) ->
    Path = erllama_cache_path:final(Root, Key),
    erllama_cache_meta_srv:mark_published(Key, Token, Path).

%% @private
announce(_TierSrv, Key, Token, Size, Header, Tokens) ->
    erllama_cache_meta_srv:announce_saved(Key, Token, Size, Header, Tokens).

%% @private
cancel(_TierSrv, Key, Token) ->
    erllama_cache_meta_srv:cancel_reservation(Key, Token).

%% @private
count(_TierSrv, {saved, unknown}) -> ok;
count(_TierSrv, {saved, cold}) -> erllama_cache_counters:incr(?SAVES_COLD);
count(_TierSrv, {saved, continued}) -> erllama_cache_counters:incr(?SAVES_CONTINUED);
count(_TierSrv, {saved, finish}) -> erllama_cache_counters:incr(?SAVES_FINISH);
count(_TierSrv, {saved, evict}) -> erllama_cache_counters:incr(?SAVES_EVICT);
count(_TierSrv, {saved, shutdown}) -> erllama_cache_counters:incr(?SAVES_SHUTDOWN);
count(_TierSrv, duplicate_dropped) -> erllama_cache_counters:incr(?DUPLICATE_DROPPED).
