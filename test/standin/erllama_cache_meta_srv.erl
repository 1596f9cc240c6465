%% Stands in for the host's reservations: a server of this name answers.
-module(erllama_cache_meta_srv).
-export([reserve_save/3, check_reservation/2, mark_published/3, announce_saved/5,
         cancel_reservation/2]).

-spec reserve_save(binary(), disk | ram_file, pid()) ->
    {ok, reference()} | {error, already_present | conflict}.
reserve_save(Key, Tier, Pid) -> gen_server:call(?MODULE, {reserve_save, Key, Tier, Pid}).

-spec check_reservation(binary(), reference()) -> ok | {error, expired}.
check_reservation(Key, Token) -> gen_server:call(?MODULE, {check_reservation, Key, Token}).

-spec mark_published(binary(), reference(), file:name_all()) -> ok | {error, expired}.
mark_published(Key, Token, Path) -> gen_server:call(?MODULE, {mark_published, Key, Token, Path}).

-spec announce_saved(binary(), reference(), pos_integer(), binary(), binary()) ->
    ok | {error, expired}.
announce_saved(Key, Token, Size, Header, Tokens) ->
    gen_server:call(?MODULE, {announce_saved, Key, Token, Size, Header, Tokens}).

-spec cancel_reservation(binary(), reference()) -> ok.
cancel_reservation(Key, Token) -> gen_server:call(?MODULE, {cancel_reservation, Key, Token}).
