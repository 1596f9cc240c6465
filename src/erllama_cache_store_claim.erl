%% A key of a store while its file is on the way: reserved by one process, then settled or given up.
%%
%% @private
-module(erllama_cache_store_claim).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

-export([reserve/4, settle/5, cancel/3, notice_other_root/1]).

%% Milliseconds after which the server of an unbounded store starts to watch a reservation. Most
%% saves have ended by then, and wake no server.
-define(UNWATCHED, 50).

-spec reserve(erllama_cache_store:name(), erllama_cache_host:tier(), erllama_cache_nif:key(),
              Size :: non_neg_integer()) ->
    {ok, erllama_cache_host:token()} | {error, term()}.
reserve(Name, Tier, Key, Size) ->
    case erllama_cache_index:config(Name) of
        #config{tier = Tier, bounded = false, server = Server} ->
            reserve_unbounded(Name, Server, Key, Size);
        #config{tier = Tier} ->
            reserve_bounded(Name, Key, Size);
        #config{tier = Other} -> {error, {wrong_tier, Other}}
    end.

reserve_unbounded(Name, Server, Key, Size) ->
    case erllama_cache_index:claimable(Name, Key) of
        {ok, Old} ->
            %% Started first: if this process is killed before the claim, the server still checks.
            %% Sent to the pid, since the name may be another server's by then.
            Token = erlang:start_timer(?UNWATCHED, Server, {watch, Key, Size, self()}),
            Row = erllama_cache_index:reservation(Key, Size, Token, self()),
            case erllama_cache_index:claim(Name, Old, Row) of
                true ->
                    ok = overdue(Name, Old),
                    {ok, Token};
                false ->
                    done(Name, Token),
                    reserve_unbounded(Name, Server, Key, Size)
            end;
        {error, _} = Error ->
            Error
    end.

%% The server may still watch the reservation that was replaced.
overdue(Name, #row{state = reserved, token = Token}) -> gen_server:cast(Name, {done, Token});
overdue(_Name, _FileOrNone) -> ok.

reserve_bounded(Name, Key, Size) ->
    %% Only the server makes room. The look at the disk need not wait for it.
    case erllama_cache_index:claimable(Name, Key) of
        {ok, _Old} ->
            Row = erllama_cache_index:reservation(Key, Size, make_ref(), self()),
            gen_server:call(Name, {admit, Row}, infinity);
        {error, _} = Error ->
            Error
    end.

%% The reserved key has its file, which is of this length.
-spec settle(erllama_cache_store:name(), erllama_cache_nif:key(), erllama_cache_host:token(),
             Size :: pos_integer(), erllama_cache_nif:key_length()) ->
    ok | {error, expired}.
settle(Name, Key, Token, Size, Length) ->
    File = erllama_cache_index:file(Key, Length, Size, erlang:system_time(millisecond), Token),
    case erllama_cache_index:settle(Name, Token, File) of
        ok ->
            ok = done(Name, Token),
            notice_other_root(erllama_cache_index:config(Name));
        {error, expired} = Error ->
            Error
    end.

-spec cancel(erllama_cache_store:name(), erllama_cache_nif:key(), erllama_cache_host:token()) -> ok.
cancel(Name, Key, Token) ->
    _ = erllama_cache_index:remove(Name, #row{key = Key, token = Token, state = reserved}),
    done(Name, Token).

%% The reservation is over. In an unbounded store the server need not know, unless it has begun to
%% watch the reservation.
done(Name, Token) ->
    Unheard = not (erllama_cache_index:config(Name))#config.bounded andalso
        is_integer(erlang:cancel_timer(Token)),
    case Unheard of
        true -> ok;
        false -> gen_server:cast(Name, {done, Token})
    end.

%% If the root was made anew, or something was mounted there, the index is another directory's.
-spec notice_other_root(#config{}) -> ok.
notice_other_root(#config{name = Name, path = Path, generation = Generation}) ->
    case erllama_cache_nif:root_generation(Path) =:= atomics:get(Generation, 1) of
        true -> ok;
        false -> gen_server:cast(Name, look_again)
    end.
